"""The tables of a run: each is built once, as a DataFrame, for the screen, the page and csv.

A value with an interval takes three columns, such as `fvu`, `fvu_low` and `fvu_high`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import pandas as pd  # type: ignore[import-untyped,unused-ignore]

from groupsae.reporting.formatting import (
    METRICS,
    NONE,
    RULE_NAMES,
    duration,
    flops,
    number,
    percent,
    span,
    spans,
)
from groupsae.reporting.load import Interval, RunFiles, Values, cost_of, interval, value_of

JOIN = "\N{WORD JOINER}"  # no line break inside a span of layers
PARTS = {
    "activations": "language model",
    "distances": "layer distances",
    "saes": "SAEs",
    "store": "filling the store",
}
BASELINES = {
    "per_layer": "one SAE per layer",
    "even": "as many groups, evenly spaced",
    "smaller": "smaller SAEs on every layer, equal cost",
}


class Column(NamedTuple):
    """How a column is headed, and how its values are written: by `str` if it holds text."""

    heading: str
    write: Callable[[Any], str] = str

    @property
    def is_text(self) -> bool:
        """Whether it is aligned to the left."""
        return self.write is str


def _digits(heading: str, digits: int) -> Column:
    return Column(heading, partial(number, digits=digits))


def _share(heading: str, digits: int = 1) -> Column:
    return Column(heading, partial(percent, digits=digits))


def _count(heading: str) -> Column:
    return Column(heading, "{:,}".format)


COLUMNS = {
    "against": Column("against"),
    "amad": _digits("AMAD", 3),
    "architecture": Column("SAE type"),
    "baseline": Column("grouping"),
    "bound_seconds": Column("bound", duration),
    "ce": _digits("CE, nats", 4),
    "ce_mean": _digits("CE at the mean, nats", 4),
    "ce_score": _digits("CE score", 4),
    "ce_zero": _digits("CE at zero, nats", 4),
    "configuration": Column("configuration"),
    "cosine": _digits("cosine", 4),
    "count": Column("count"),
    "d_sae": _count("latents"),
    "dead": _share("dead"),
    "delta_ce": _digits("ΔCE, nats", 4),
    "delta_ce_lost": _digits("ΔCE lost, nats", 4),
    "delta_ce_percent": _digits("ΔCE, %", 2),
    "delta_ce_percent_lost": _digits("ΔCE lost, %", 2),
    "dense": _share("dense"),
    "diameter": _digits("largest angle, fractions of π", 4),
    "difference": _digits("difference", 4),
    "distinguishable": Column("distinguishable"),
    "explained_variance_dictionary_learning": _digits("EV dictionary_learning", 4),
    "explained_variance_legacy": _digits("EV legacy", 4),
    "explained_variance_saebench": _digits("EV saebench", 4),
    "factor": _digits("factor", 2),
    "flops": _share("FLOPs", 0),
    "flops_saved": _share("FLOPs saved"),
    "fvu": _digits("FVU", 4),
    "fvu_lost": _digits("FVU lost", 4),
    "grouping": Column("grouping"),
    "groupings": _count("groupings"),
    "groups": Column("groups"),
    "interval": Column("interval"),
    "kl": _digits("KL, nats", 4),
    "l0": _digits("L0", 1),
    "layer": Column("layer"),
    "layers": Column("layers"),
    "lower_in": Column("lower in"),
    "mean_effective_layers": _digits("mean layers in use", 2),
    "measured_flops": Column("FLOPs measured", flops),
    "measured_on": Column("evaluated on"),
    "metric": Column("metric"),
    "mmco": _digits("MMCO", 3),
    "mmcs": _digits("MMCS", 3),
    "mse": _digits("MSE", 2),
    "norm_ratio": _digits("norm ratio", 4),
    "num_groups": _count("G"),
    "part": Column("part"),
    "planned_flops": Column("FLOPs planned", flops),
    "relative_bias": _digits("relative bias", 4),
    "rms_norm": _digits("RMS norm", 2),
    "rules": Column("made by"),
    "run": Column("run"),
    "sae": Column("SAE"),
    "saved": _share("saved"),
    "seconds": Column("time", duration),
    "seconds_separately": Column("one run each", duration),
    "seconds_share": _share("time", 0),
    "seed": Column("seed", "{:d}".format),
    "specific": _share("specific"),
    "tokens": _count("tokens"),
    "tokens_per_layer": Column("tokens per layer"),
}


class Cell(NamedTuple):
    """A value as text, and its interval as a note."""

    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its csv file, without the ending.
        caption: what it holds.
        frame: plain values; its columns are in COLUMNS, with the ends of intervals next to them.
        marked: indices of the rows that are set off.
    """

    name: str
    caption: str
    frame: pd.DataFrame
    marked: Sequence[int] = ()

    @property
    def columns(self) -> dict[str, Column]:
        """The columns to show, without the ends of intervals."""
        return {name: COLUMNS[name] for name in self.frame if name in COLUMNS}

    def values(self, row: int, column: str) -> tuple[Any, Any, Any]:
        """Return a value and the ends of its interval; None for what is missing."""
        record = self._records[row]
        return record[column], record.get(f"{column}_low"), record.get(f"{column}_high")

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        found = self.frame.astype(object)
        return found.where(self.frame.notna(), None).to_dict("records")

    def cell(self, row: int, column: str) -> Cell:
        """Return a value and its interval as text."""
        (value, low, high), write = self.values(row, column), COLUMNS[column].write
        if value is None:
            return Cell(NONE)
        return Cell(write(value), "" if low is None else f"{write(low)} to {write(high)}")

    @property
    def rows(self) -> list[list[tuple[Column, Cell]]]:
        """The cells of every row with their columns."""
        return [
            [(column, self.cell(row, name)) for name, column in self.columns.items()]
            for row in range(len(self.frame))
        ]


def build(
    name: str, caption: str, rows: Iterable[Values], marked: Sequence[int] = ()
) -> Table | None:
    """Return a table without the columns that are empty; None without rows."""
    frame = pd.DataFrame(list(rows)).dropna(axis=1, how="all").convert_dtypes()
    return None if frame.empty else Table(name, caption, frame, marked)


def estimates(values: Values, *metrics: str, suffix: str = "") -> dict[str, float | None]:
    """Return the three columns of each of some metrics."""
    row: dict[str, float | None] = {}
    for metric in metrics:
        found = interval(values.get(metric)) or (None, None, None)
        row |= zip((f"{metric}{suffix}{end}" for end in ("", "_low", "_high")), found, strict=True)
    return row


def plain(values: Values, *metrics: str) -> dict[str, float | None]:
    """Return the values of some metrics without their intervals."""
    return {metric: value_of(values.get(metric)) for metric in metrics}


# ---- a run and its training ---------------------------------------------------------------------


def groups_table(run: RunFiles) -> Table | None:
    """Return the SAEs with their layers and largest angles."""
    pairs = zip(run.plan.get("groups", []), run.plan.get("diameters", []), strict=True)
    diameters = {tuple(group): diameter for group, diameter in pairs if len(group) > 1}
    return build(
        "groups",
        "The SAEs of this run",
        (
            {"sae": name, "layers": span(layers), "diameter": diameters.get(tuple(layers))}
            for name, layers in run.saes.items()
        ),
    )


def trained_table(run: RunFiles, saes: Iterable[str]) -> Table | None:
    """Return the figures of some SAEs on held-out text at the end of training."""
    groups, rows = run.summary.get("groups", {}), []
    for name in saes:
        group = groups[name]
        counts = group["tokens_per_layer"].values()
        rows.append(
            {
                "sae": name,
                "layers": span(group["layers"]),
                "tokens_per_layer": " to ".join(
                    f"{n:,}" for n in sorted({min(counts), max(counts)})
                ),
                **plain(group, "fvu", "l0", "dead"),
            }
        )
    if rows:
        rows.append({"sae": "mean over layers", **plain(run.summary, "fvu")})
    return build(
        "trained", "Held-out reconstruction at the end of training", rows, [len(rows) - 1]
    )


def parts_table(run: RunFiles) -> Table | None:
    """Return the work of each part of a run, planned by the cost model and measured."""
    ledger, evaluated = run.ledger, run.evaluation.get("cost")
    rows = list(ledger.get("parts", []))
    if rows and evaluated:
        rows.append({"part": "evaluation", **evaluated})
    marked = []
    if ledger.get("per_layer"):
        marked.append(len(rows))
        rows.append({"part": "instead: one SAE per layer", **ledger["per_layer"]})
    where = str(ledger.get("device", "")).upper()
    where += f", {ledger['threads']} threads" if where == "CPU" and ledger.get("threads") else ""
    return build(
        "cost",
        f"Cost, planned by the cost model and measured ({where}; {ledger.get('num_saes')} SAEs, "
        f"{ledger.get('tokens', 0):,} tokens each)",
        (
            {
                "part": PARTS.get(row["part"], row["part"]),
                **{key: row.get(key) for key in ("planned_flops", "measured_flops", "seconds")},
            }
            for row in rows
        ),
        marked,
    )


def saved_table(run: RunFiles) -> Table | None:
    """Return the saving against one SAE per layer, in each way to count it."""
    counts = {
        "flops": "FLOPs, with the language model, the distances and the last layer",
        "seconds": "time",
        "paper": "as the paper counts",
        "paper_both_sides": "as the paper counts, the last layer on both sides",
    }
    saving = run.ledger.get("saving", {})
    return build(
        "saved",
        "Saved against one SAE per layer at equal tokens",
        (
            {"count": text, "saved": saving[key]}
            for key, text in counts.items()
            if saving.get(key) is not None
        ),
    )


def sharing_table(run: RunFiles) -> Table | None:
    """Return the time of training all groupings from one stream and of one run for each."""
    keys = ("groupings", "seconds", "seconds_separately", "factor", "bound_seconds")
    sharing = run.ledger.get("sharing")
    return build(
        "sharing",
        "All groupings from one stream (bound: the language model twice, each SAE once)",
        [{key: sharing[key] for key in keys}] if sharing else [],
    )


# ---- an evaluation ------------------------------------------------------------------------------


def layers_table(run: RunFiles) -> Table | None:
    """Return the figures of every layer with the SAE of its group, and means over layers."""
    chosen = run.chosen or {}
    found = [(str(x), row["sae"], row) for x, row in run.layer_results(chosen).items()]
    for sae in run.evaluation.get("saes", []):
        if sae["name"] in chosen.get("saes", []) and len(sae["layers"]) > 1:
            found.append(("mean", sae["name"], sae))
    if found:
        found += [
            ("mean", f"{name} layers", chosen[f"{name}_layers"]) for name in ("grouped", "all")
        ]
    return build(
        "layers",
        "Every layer with the SAE of its group, and means over layers",
        (
            {
                "layer": layer,
                "sae": sae,
                **estimates(row, "fvu", "delta_ce", "delta_ce_percent", "ce_score", "kl"),
                **plain(row, "l0"),
            }
            for layer, sae, row in found
        ),
        [i for i, (layer, *_) in enumerate(found) if layer == "mean"],
    )


def scale_table(run: RunFiles) -> Table | None:
    """Return the CE with a layer ablated: the ends of the scale that a CE score is on."""
    clean = interval(run.evaluation.get("ce"))
    if clean is None:  # the model predicts no next token
        return None
    low, high = clean.bounds
    return build(
        "ce_scale",
        f"The model's CE is {number(clean.value)} nats ({number(low)} to {number(high)}); "
        "with a layer set to zero (where the CE score is 0) or to its mean it becomes",
        (
            {
                "layer": str(row["layer"]),
                **estimates(row, "ce_zero", "ce_mean"),
                **plain(row, "rms_norm"),
            }
            for row in run.evaluation["layers"]
        ),
    )


def variants_table(run: RunFiles) -> Table | None:
    """Return reconstruction as other tools name and count it."""
    keys = (
        "fvu",
        "explained_variance_legacy",
        "explained_variance_dictionary_learning",
        "explained_variance_saebench",
        "mse",
        "cosine",
        "norm_ratio",
        "relative_bias",
    )
    return build(
        "variants",
        "Reconstruction in the definitions of other tools (EV: explained variance)",
        (
            {"layer": str(layer), **plain(row, *keys)}
            for layer, row in run.layer_results(run.chosen).items()
        ),
    )


def saes_table(run: RunFiles) -> Table | None:
    """Return the SAEs of the chosen grouping: means over their layers, and their latents."""
    saes = {sae["name"]: sae for sae in run.evaluation.get("saes", [])}
    rows = []
    for sae in (saes[name] for name in run.saes if name in saes):
        profile = (sae.get("profile") or {}) if len(sae["layers"]) > 1 else {}
        rows.append(
            {
                "sae": sae["name"],
                **estimates(sae, "fvu", "delta_ce"),
                **{key: sae.get(key) for key in ("d_sae", "architecture", "dead", "dense")},
                **{key: profile.get(key) for key in ("specific", "mean_effective_layers")},
            }
        )
    return build(
        "saes",
        "Each SAE: means over its layers, and its latents (specific: more than 90 % of the "
        "firings in one layer)",
        rows,
    )


def similarity_table(run: RunFiles) -> Table | None:
    """Return MMCS and MMCO of every layer that shares an SAE."""
    return build(
        "similarity",
        "The layer's own SAE against its group's",
        (
            {
                "layer": str(layer),
                "sae": row["sae"],
                "mmcs": row.get("mmcs"),
                "mmco": row.get("mmco"),
            }
            for layer, row in run.similarity.items()
        ),
    )


def groupings_table(run: RunFiles) -> Table | None:
    """Return every grouping with its means over the grouped layers, and its cost."""
    rows = []
    for grouping in run.groupings:
        kind, cost = grouping["kind"], grouping.get("cost") or {}
        names = [RULE_NAMES.get(rule, rule) for rule in grouping.get("rules") or []]
        if kind != "groups":
            names = [BASELINES[kind]]
        lost = grouping.get("against_per_layer") or {}
        rows.append(
            {
                "grouping": grouping["name"],
                "rules": ", ".join([*names, "chosen"] if grouping is run.chosen else names),
                "groups": "one each"
                if kind != "groups"
                else spans(grouping["groups"]).replace(NONE, NONE + JOIN),
                "num_groups": grouping["num_groups"],
                "amad": grouping.get("amad"),
                "flops": cost_of(grouping),
                "seconds_share": cost.get("seconds"),
                **estimates(grouping["grouped_layers"], "fvu", "delta_ce", "delta_ce_percent"),
                **estimates(lost, "fvu", "delta_ce", "delta_ce_percent", suffix="_lost"),
            }
        )
    return build(
        "groupings",
        "Every grouping: mean over the grouped layers, lost and cost against one SAE per layer"
        if len(rows) > 1
        else "Mean over the grouped layers; cost against one SAE per layer",
        rows,
        [0],
    )


def together_table(run: RunFiles) -> Table | None:
    """Return the effect of all layers replaced at once, where it was measured."""
    return build(
        "together",
        "All layers replaced at once",
        (
            {
                "grouping": grouping["name"],
                **estimates(
                    grouping["spliced_together"], "ce", "delta_ce", "delta_ce_percent", "kl"
                ),
            }
            for grouping in run.groupings
            if grouping.get("spliced_together")
        ),
    )


def baselines_table(run: RunFiles) -> Table | None:
    """Return the chosen grouping minus each baseline, and whether the two are distinguishable.

    They are where the interval of the difference leaves out 0.
    """
    rows = []
    for kind, name in BASELINES.items():
        baseline = run.baseline(kind)
        differences, paired = _differences(run, baseline) if baseline is not None else ({}, False)
        for metric, difference in differences.items():
            known = difference.low is not None
            rows.append(
                {
                    "against": name,
                    "baseline": (baseline or {})["name"],
                    "metric": COLUMNS[metric].heading,
                    **estimates({"difference": difference}, "difference"),
                    "distinguishable": {-1: "yes: better", 0: "no", 1: "yes: worse"}[
                        difference.sign
                    ]
                    if known
                    else None,
                    "interval": ("paired" if paired else "not paired, too wide")
                    if known
                    else None,
                }
            )
    return build(
        "baselines",
        "The chosen grouping minus each baseline, mean over the grouped layers (lower is better)",
        rows,
    )


def _differences(run: RunFiles, baseline: Values) -> tuple[dict[str, Interval], bool]:
    """Return metric -> chosen minus baseline, and whether its interval is paired.

    If not, it is made from both groupings' intervals against one SAE per layer, which makes it too
    wide rather than too narrow.
    """
    chosen = run.chosen or {}
    lost = chosen.get("against_per_layer") or {}
    if baseline is run.per_layer:
        return _intervals(lost), True
    for row in run.evaluation.get("comparisons") or []:
        if row["grouping"] == chosen["name"] and row["baseline"] == baseline["name"]:
            return _intervals(row), True
    own, other = _intervals(lost), _intervals(baseline.get("against_per_layer") or {})
    differences = {}
    for metric, a in own.items():
        b = other.get(metric)
        if b is None:
            continue
        known = None not in (a.low, b.low)
        (low, high), (other_low, other_high) = a.bounds, b.bounds
        ends = (low - other_high, high - other_low) if known else (None, None)
        differences[metric] = Interval(a.value - b.value, *ends)
    return differences, False


def _intervals(row: Values) -> dict[str, Interval]:
    found = {m: interval(row.get(m)) for m in (*METRICS, "delta_ce_percent")}
    return {metric: value for metric, value in found.items() if value is not None}
