"""The tables of a run: each is built once, as a DataFrame, for the screen, the page and csv.

A value with an interval takes three columns, such as `fvu`, `fvu_low` and `fvu_high`; one with a
link two, such as `latent` and `latent_link`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]

from groupsae.grouping.partition import LOSS_PER_VARIANCE
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
from groupsae.reporting.load import RunFiles, Values, interval, value_of

# fmt: off
HEADINGS = {  # of the columns that are shown
    "fvu_lost_predicted": "by V",
    "run": "run", "configuration": "configuration", "part": "part", "count": "count",
    "layer": "layer", "sae": "SAE", "layers": "layers", "tokens_per_layer": "tokens per layer",
    "rows": "rows",
    "grouping": "grouping", "rules": "made by", "groups": "groups", "against": "against",
    "baseline": "baseline", "metric": "metric", "architecture": "SAE type", "seed": "seed",
    "diameter": "largest angle, fractions of π", "num_groups": "G", "amad": "AMAD",
    "flops": "FLOPs", "seconds_share": "time",
    "fvu": "FVU", "fvu_rest": "FVU of the rest", "largest_share": "largest 1 % of dimensions",
    "delta_ce": "ΔCE, nats", "delta_ce_percent": "ΔCE, %", "ce_score": "CE score",
    "kl": "KL, nats", "l0": "L0",
    "embedding_loss": "1 − cos", "embedding_score": "score", "retrieval_loss": "retrieval lost",
    "embedding_loss_lost": "1 − cos lost", "retrieval_loss_lost": "retrieval lost by sharing",
    "embedding_loss_together": "1 − cos, all at once",
    "retrieval_loss_together": "retrieval lost, all at once",
    "retrieval_together": "retrieval, all at once",
    "embedding_loss_zero": "1 − cos at zero", "embedding_loss_mean": "1 − cos at the mean",
    "fvu_lost": "FVU lost", "delta_ce_lost": "ΔCE lost, nats",
    "delta_ce_percent_lost": "ΔCE lost, %",
    "ce_together": "CE, all layers at once, nats", "delta_ce_together": "ΔCE, all at once, nats",
    "delta_ce_percent_together": "ΔCE, all at once, %", "kl_together": "KL, all at once, nats",
    "difference": "difference", "distinguishable": "distinguishable", "lower_in": "lower in",
    "ce_zero": "CE at zero, nats", "ce_mean": "CE at the mean, nats", "rms_norm": "RMS norm",
    "explained_variance_legacy": "EV legacy",
    "explained_variance_dictionary_learning": "EV dictionary_learning",
    "explained_variance_saebench": "EV saebench",
    "mse": "MSE", "cosine": "cosine", "norm_ratio": "norm ratio", "relative_bias": "relative bias",
    "mmcs": "MMCS", "mmco": "MMCO",
    "d_sae": "latents", "dead": "dead", "dense": "dense", "specific": "specific",
    "mean_effective_layers": "mean layers in use",
    "planned_flops": "FLOPs planned", "measured_flops": "FLOPs measured", "seconds": "time",
    "saved": "saved", "groupings": "groupings", "seconds_separately": "one run each",
    "factor": "factor", "bound_seconds": "bound",
    "mean_share": "its mean", "dimension_share": "its largest dimension", "dimension": "which",
    "token_cosine": "cosine of two tokens",
    "flops_saved": "FLOPs saved", "tokens": "tokens", "measured_on": "evaluated on",
    "explained": "latents", "f1": "F1", "adjusted_f1": "F1, adjusted",
    "one_label_f1": "one label", "lexicality": "by token",
    "shift_f1": "F1, moved", "direction_f1": "F1, directions", "judge": "judge",
    "detection_f1": "detection F1", "fuzzing_f1": "fuzzing F1",
    "detection_f1_difference": "detection − per layer",
    "fuzzing_f1_difference": "fuzzing − per layer",
    "f1_difference": "F1 − per layer", "one_label_f1_difference": "one label − per layer",
    "matched": "matched", "matched_cosine": "cosine", "matched_difference": "F1 − match",
    "random_difference": "F1 − random", "labels": "labels", "label_cost": "one label costs",
    **{f"tau_{apart}": f"τ at {apart}" for apart in (1, 2, 4, 8)},
    "k": "k", "auc": "AUC", "auc_lost": "AUC lost", "auc_channels": "AUC of k channels",
    "auc_residual": "AUC of all channels", "task": "task", "clean": "unchanged model",
    "chance": "by chance", "above_chance": "better than chance by", "interpreted": "interpreted",
    "documents": "documents", "lost_together": "lost, all at once", "lost": "lost, one layer",
    "against_together": "all at once − per layer", "against_alone": "one layer − per layer",
    "same": "same", "narrows": "narrows", "different": "different", "unclear": "unclear",
    "one_layer": "one layer", "latent": "latent", "explanation": "explanation", "kind_of": "kind",
    "labels_of": "labels",
    "accuracy": "accuracy", "task_metric": "metric", "reason": "left out because",
    "effect": "effect", "single_layers": "one layer spliced",
    "ld_left": "LD left", "ld_left_lost": "lost, left",
    "ld_recovered": "LD recovered", "faithfulness_none": "no errors",
    "faithfulness_keep": "errors kept",
    "completeness_none": "completeness",
    "random_none": "random",
    "ld_recovered_lost": "lost, recovered", "faithfulness_none_lost": "lost, no errors",
    "faithfulness_keep_lost": "lost, errors kept",
}
DIGITS = {  # after the decimal point; others have 4
    "l0": 1,
    **dict.fromkeys((
        "mse", "rms_norm", "factor", "mean_effective_layers", "delta_ce_percent",
        "delta_ce_percent_lost", "delta_ce_percent_together", "labels", "accuracy", "task_metric",
        "tau_1", "tau_2", "tau_4", "tau_8",
    ), 2),
    **dict.fromkeys((
        "amad", "mmcs", "mmco", "token_cosine", "f1", "adjusted_f1", "one_label_f1", "lexicality",
        "label_cost", "shift_f1", "direction_f1", "detection_f1", "fuzzing_f1",
        "detection_f1_difference", "fuzzing_f1_difference", "f1_difference",
        "one_label_f1_difference", "matched_difference", "random_difference", "matched_cosine",
        "ld_left", "ld_left_lost", "ld_recovered", "ld_recovered_lost", "faithfulness_none",
        "faithfulness_none_lost", "faithfulness_keep", "faithfulness_keep_lost",
        "completeness_none", "random_none", "single_layers", "auc", "auc_lost", "auc_channels",
        "auc_residual", "clean", "chance", "above_chance", "lost_together", "lost",
        "against_together", "against_alone",
    ), 3),
}
INTEGERS = (
    "num_groups", "rows", "d_sae", "dimension", "tokens", "groupings", "seed", "explained",
    "matched", "latent", "documents", "k",
)
# fmt: on
WRITERS: dict[str, Callable[[Any], str]] = {  # of other numbers
    **dict.fromkeys(INTEGERS, "{:,}".format),
    **dict.fromkeys(("dead", "dense", "specific", "saved", "flops_saved"), percent),
    **dict.fromkeys(("mean_share", "dimension_share", "largest_share"), percent),
    **dict.fromkeys(("flops", "seconds_share"), partial(percent, digits=0)),
    **dict.fromkeys(("planned_flops", "measured_flops"), flops),
    **dict.fromkeys(("seconds", "seconds_separately", "bound_seconds"), duration),
    **dict.fromkeys(("seed", "dimension", "latent"), str),
    **dict.fromkeys(("same", "narrows", "different", "unclear", "one_layer"), percent),
}
DIFFERENCES = (*METRICS, "delta_ce_percent", "retrieval_loss")
PARTS = {
    "activations": "language model",
    "distances": "layer distances",
    "saes": "SAEs",
    "store": "filling the store",
}
EXTREME = 10  # latents in the tables of the best and the worst explained
BASELINES = {  # by the kind of grouping
    "per_layer": "one SAE per layer",
    "groups": "as many groups, evenly spaced",
    "smaller": "smaller SAEs on every layer, equal cost",
}


def write(column: str, value: Any) -> str:
    """Return a value of a column as text."""
    if value is None or isinstance(value, str):
        return value or NONE
    return WRITERS[column](value) if column in WRITERS else number(value, DIGITS.get(column, 4))


class Cell(NamedTuple):
    """A value and its interval as text, whether the column is aligned to the left, and a link."""

    value: str
    note: str
    is_text: bool
    link: str = ""


@dataclass(frozen=True)
class Table:
    """A table."""

    name: str  # of its csv file, without the ending
    caption: str
    frame: pd.DataFrame
    marked: Sequence[int] = ()  # rows that are set off

    @property
    def columns(self) -> list[str]:
        """The columns to show: without the ends of intervals."""
        return [name for name in self.frame if name in HEADINGS]

    def heading(self, column: str) -> Cell:
        """Return the heading of a column."""
        text = not pd.api.types.is_numeric_dtype(self.frame[column])
        return Cell(HEADINGS[column], "", text)

    def cell(self, row: int, column: str, *, half: bool = False) -> Cell:
        """Return a cell: with the ends of its interval as a note, or half of it after ±."""
        record = self._records[row]
        value, low, high = (record.get(f"{column}{end}") for end in ("", "_low", "_high"))
        text, is_text = write(column, value), self.heading(column).is_text
        if low is None:
            return Cell(text, "", is_text, record.get(f"{column}_link") or "")
        if half:
            return Cell(f"{text} ±{write(column, (high - low) / 2)}", "", is_text)
        return Cell(text, f"{write(column, low)} to {write(column, high)}", is_text)

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        found = self.frame.astype(object)
        return found.where(self.frame.notna(), None).to_dict("records")

    @property
    def rows(self) -> list[list[Cell]]:
        """The cells of every row."""
        return [[self.cell(row, name) for name in self.columns] for row in range(len(self.frame))]


def build(
    name: str, caption: str, rows: Iterable[Values], marked: Sequence[int] = ()
) -> Table | None:
    """Return a table without the columns that are empty; None without rows."""
    frame = pd.DataFrame(list(rows)).dropna(axis=1, how="all")
    frame = frame.astype({column: "Int64" for column in INTEGERS if column in frame})
    return None if frame.empty else Table(name, caption, frame, marked)


def estimates(values: Values, *metrics: str, suffix: str = "") -> dict[str, float | None]:
    """Return the three columns of each of some metrics."""
    row: dict[str, float | None] = {}
    for metric in metrics:
        names = (f"{metric}{suffix}{end}" for end in ("", "_low", "_high"))
        row |= zip(names, interval(values.get(metric)), strict=True)
    return row


def points(frame: pd.DataFrame, x: str, metric: str) -> tuple[np.ndarray, ...]:
    """Return x, values, and the ends of their intervals (else the values), from left to right."""
    columns = [x, metric, f"{metric}_low", f"{metric}_high"]
    found = frame.reindex(columns=columns).dropna(subset=columns[:2]).sort_values(x, kind="stable")
    found = found.astype(float)
    return tuple(found[name].fillna(found[metric]).to_numpy() for name in columns)


def distinguishable(difference: Any) -> str | None:
    """Return whether the interval of a difference, positive if worse, leaves out 0."""
    _, low, high = interval(difference)
    if low is None or high is None:
        return None
    return "yes: better" if high < 0 else "yes: worse" if low > 0 else "no"


def plain(values: Values, *metrics: str) -> dict[str, float | None]:
    """Return the values of some metrics without their intervals."""
    return {metric: value_of(values.get(metric)) for metric in metrics}


# ---- a run and its training ---------------------------------------------------------------------


def groups_table(run: RunFiles, *, others: bool = False) -> Table | None:
    """Return the SAEs with their layers and largest angles, and the figures of their training.

    `others`: also the SAEs that are not of the chosen grouping.
    """
    trained, plan = run.summary.get("groups", {}), run.plan
    several = run.summary.get("layers_per_token", 1) > 1  # else as many rows as tokens
    names = [*(run.saes or run.summary.get("chosen", ())), *(trained if others else ())]
    layers = {name: group["layers"] for name, group in trained.items()} | run.saes
    groups = map(str, plan.get("groups", ()))
    diameters = dict(zip(groups, plan.get("diameters", ()), strict=True))
    rows = []
    for name in dict.fromkeys(names):
        shared, figures = len(layers[name]) > 1, trained.get(name, {})
        counts = figures.get("tokens_per_layer", {}).values()
        ends = {min(counts), max(counts)} if counts else ()
        rows.append(
            {
                "sae": name,
                "layers": span(layers[name]),
                "diameter": diameters.get(str(layers[name])) if shared else None,
                "tokens_per_layer": " to ".join(f"{n:,}" for n in sorted(ends)) or None,
                "rows": figures.get("rows") if several else None,
                **plain(figures, "fvu", "l0", "dead"),
            }
        )
    if trained:
        rows.append({"sae": "mean over layers", **plain(run.summary, "fvu")})
    caption = "The SAEs; FVU and L0 on held-out text; dead latents by the counters of training"
    return build(
        "groups", caption if trained else "The SAEs", rows, [len(rows) - 1] if trained else []
    )


def shares_table(run: RunFiles) -> Table | None:
    """Return the share of the mean and of the largest dimension in each layer's squared norm."""
    shares, shown = run.shares, ("mean_share", "dimension_share", "dimension", "token_cosine")
    columns = {} if shares is None else {name: getattr(shares, name) for name in shown}
    return build(
        "shares",
        "Shares in the squared norm of each layer's activations; mean cosine of two tokens",
        [
            {"layer": str(layer), **dict(zip(shown, values, strict=True))}
            for layer, values in enumerate(zip(*columns.values(), strict=True))
        ],
    )


def parts_table(run: RunFiles) -> Table | None:
    """Return the work of each part of a run, planned by the cost model and measured."""
    ledger, keys = run.ledger, ("planned_flops", "measured_flops", "seconds")
    rows = list(ledger.get("parts", []))
    if rows and run.evaluation:
        rows.append({"part": "evaluation", **run.evaluation["cost"]})
    if ledger.get("per_layer"):
        rows.append({"part": "instead: one SAE per layer", **ledger["per_layer"]})
    where = str(ledger.get("device", "")).upper()
    where += f", {ledger['threads']} threads" if where == "CPU" else ""
    return build(
        "cost",
        f"Cost, planned by the cost model and measured ({where}; {ledger.get('num_saes')} SAEs, "
        f"{ledger.get('tokens', 0):,} tokens each)",
        [
            {"part": PARTS.get(row["part"], row["part"]), **{key: row.get(key) for key in keys}}
            for row in rows
        ],
        [len(rows) - 1] if ledger.get("per_layer") else [],
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
        [{"count": text, "saved": saving[key]} for key, text in counts.items() if key in saving],
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
    layers = len(found)
    for sae in run.evaluation.get("saes", []):
        if sae["name"] in chosen.get("saes", []) and len(sae["layers"]) > 1:
            found.append(("mean", sae["name"], sae))
    for name in ("grouped", "all") if chosen else ():
        found.append(("mean", f"{name} layers", chosen[f"{name}_layers"]))
    metrics = [
        *("fvu", "delta_ce", "delta_ce_percent", "ce_score", "kl"),
        *("embedding_loss", "embedding_score", "retrieval_loss"),  # of encoders
    ]
    return build(
        "layers",
        "Every layer with the SAE of its group, and means over layers",
        [
            {"layer": layer, "sae": sae, **estimates(row, *metrics), **plain(row, "l0")}
            for layer, sae, row in found
        ],
        range(layers, len(found)),
    )


def scale_table(run: RunFiles) -> Table | None:
    """Return the loss with a layer ablated: the ends of the scale that a score is on."""
    clean, low, high = interval(run.evaluation.get("ce"))
    retrieval, chance = (
        value_of(run.evaluation.get(key)) for key in ("retrieval", "retrieval_chance")
    )
    if clean is None and retrieval is None:
        return None
    ends = "" if low is None else f" ({number(low)} to {number(high)})"
    caption = (
        f"The model's CE is {number(clean)} nats{ends}; with a "
        "layer set to zero (where the CE score is 0) or to its mean it becomes"
        if clean is not None
        else f"The model's embeddings find a block of the same document: mean reciprocal rank "
        f"{number(retrieval)} (in a random order {number(chance)}). With a layer set to zero "
        "(where the embedding score is 0) or to its mean, 1 − the cosine with the model's own "
        "embeddings is"
    )
    return build(
        "ce_scale",
        caption,
        [
            {
                "layer": str(x["layer"]),
                **estimates(x, "ce_zero", "ce_mean", "embedding_loss_zero", "embedding_loss_mean"),
                **plain(x, "rms_norm", "largest_share"),
            }
            for x in run.evaluation.get("layers", [])
        ],
    )


def variants_table(run: RunFiles) -> Table | None:
    """Return reconstruction as other tools name and count it."""
    tools = ("legacy", "dictionary_learning", "saebench")
    keys = ("fvu", "fvu_rest", *(f"explained_variance_{tool}" for tool in tools))
    keys += ("mse", "cosine", "norm_ratio", "relative_bias")
    return build(
        "variants",
        "Reconstruction without the 1 % of dimensions of the largest variance (FVU of the rest), "
        "and in the definitions of other tools (EV: explained variance)",
        [{"layer": str(x), **plain(r, *keys)} for x, r in run.layer_results(run.chosen).items()],
    )


def similarity_table(run: RunFiles) -> Table | None:
    """Return MMCS and MMCO of every layer that shares an SAE."""
    return build(
        "similarity",
        "The layer's own SAE against its group's",
        [
            {"layer": str(layer), "sae": row["sae"], **plain(row, "mmcs", "mmco")}
            for layer, row in run.similarity.items()
        ],
    )


def latents_table(run: RunFiles) -> Table | None:
    """Return the SAEs of the chosen grouping: means over their layers, and their latents."""
    saes, rows = {sae["name"]: sae for sae in run.evaluation.get("saes", [])}, []
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
        "latents",
        "Each SAE: means over its layers, and its latents (specific: more than 90 % of the "
        "firings in one layer)",
        rows,
    )


def groupings_table(run: RunFiles) -> Table | None:
    """Return every grouping with its means over the grouped layers, and its cost."""
    rows, alone = [], value_of(((run.per_layer or {}).get("grouped_layers") or {}).get("fvu"))
    for grouping in run.groupings:
        grouped, variance = grouping["kind"] == "groups", grouping.get("variance")
        predicted = None
        if grouped and alone is not None and variance is not None:
            predicted = LOSS_PER_VARIANCE * variance * alone
        rules = [RULE_NAMES.get(rule, rule) for rule in grouping["rules"]]
        made_by = rules if grouped else [BASELINES[grouping["kind"]]]
        together = grouping.get("spliced_together") or {}
        cost = grouping["cost"] or {}
        rows.append(
            {
                "grouping": grouping["name"],
                "kind": grouping["kind"],
                "rule": (grouping["rules"] or [""])[0],
                "rules": ", ".join(made_by + ["chosen"] * (grouping is run.chosen)),
                "groups": spans(grouping["groups"]) if grouped else "one each",
                "num_groups": grouping["num_groups"],
                "amad": grouping["amad"],
                "flops": cost.get("flops"),
                "seconds_share": cost.get("seconds"),
                **estimates(grouping["grouped_layers"], *DIFFERENCES),
                **estimates(grouping["against_per_layer"] or {}, *DIFFERENCES, suffix="_lost"),
                "fvu_lost_predicted": predicted,
                **estimates(together, "ce", *DIFFERENCES[1:], "kl", suffix="_together"),
                **estimates(together, "retrieval", suffix="_together"),
            }
        )
    return build(
        "groupings",
        "Every grouping: mean over the grouped layers, lost and cost against one SAE per layer; "
        "by V: the FVU lost as its angular variance predicts it"
        if len(rows) > 1
        else "Mean over the grouped layers; cost against one SAE per layer",
        rows,
        [0],
    )


def baselines_table(run: RunFiles) -> Table | None:
    """Return the chosen grouping minus each baseline, and whether the two are distinguishable.

    They are where the interval of the difference, paired over the same text, leaves out 0.
    """
    chosen = run.chosen or {}
    pairs = {
        row["baseline"]: row
        for row in run.evaluation.get("comparisons", [])
        if row["grouping"] == chosen["name"]
    }
    if run.per_layer:
        pairs = {run.per_layer["name"]: chosen["against_per_layer"] or {}} | pairs
    kinds = {grouping["name"]: grouping["kind"] for grouping in run.groupings}
    rows = []
    for name, differences in pairs.items():
        for metric in DIFFERENCES:
            if value_of(differences.get(metric)) is not None:
                rows.append(
                    {
                        "against": BASELINES[kinds[name]],
                        "baseline": name,
                        "metric": HEADINGS[metric],
                        **estimates({"difference": differences[metric]}, "difference"),
                        "distinguishable": distinguishable(differences[metric]),
                    }
                )
    return build(
        "baselines",
        "The chosen grouping minus each baseline, mean over the grouped layers (lower is better)",
        rows,
    )


# ---- an interpretation --------------------------------------------------------------------------


def explained_table(run: RunFiles) -> Table | None:
    """Return how well the latents of each grouping are explained, against one SAE per layer."""
    return _interpreted(
        run,
        "explained",
        "How well rules explain latents on held-out text, means over grouped layers and latents: "
        "F1 of an explanation for each layer, and of one label for all layers of a group; "
        "by token: what a table of tokens predicts; moved: against its firings laid onto other "
        "documents; directions: rules about random directions of like density",
        "f1",
        "grouping", "num_groups", "explained", "f1", "adjusted_f1", "one_label_f1", "lexicality",
        "f1_difference", "one_label_f1_difference", "shift_f1", "direction_f1",
    )  # fmt: skip


def judged_table(run: RunFiles) -> Table | None:
    """Return how well a language model explains the latents of each grouping."""
    return _interpreted(
        run,
        "judged",
        "How well a language model explains latents: F1 at the natural rate",
        "detection_f1",
        "grouping", "num_groups", "judge", "detection_f1", "fuzzing_f1",
        "detection_f1_difference", "fuzzing_f1_difference",
    )  # fmt: skip


def matched_table(run: RunFiles) -> Table | None:
    """Return how latents of shared SAEs compare with the nearest of the layers' own SAEs."""
    return _interpreted(
        run,
        "matched",
        "Latents of shared SAEs and those of the layer's own SAE with the most similar direction, "
        "or random ones",
        "matched_difference",
        "grouping", "matched", "matched_cosine", "matched_difference", "random_difference",
    )  # fmt: skip


def meaning_table(run: RunFiles) -> Table | None:
    """Return whether the latents of each grouping mean the same at all their layers."""
    return _interpreted(
        run,
        "meaning",
        "Does a shared latent mean the same at all its layers? Labels that it needs, transfer τ "
        "between layers at a distance of 1, 2, 4 and 8, and shares of the kinds of latents",
        "one_layer",
        "grouping", "labels", "label_cost", "tau_1", "tau_2", "tau_4", "tau_8", "same", "narrows",
        "different", "unclear", "one_layer",
    )  # fmt: skip


def _interpreted(
    run: RunFiles, name: str, caption: str, needed: str, *columns: str
) -> Table | None:
    """Return columns of `interpretation/groupings.csv`, for groupings that have the needed one."""
    frame = run.explained.get("groupings", pd.DataFrame())
    if needed not in frame:
        return None
    wanted = [f"{column}{end}" for column in columns for end in ("", "_low", "_high")]
    rows = frame.loc[frame[needed].notna(), [column for column in wanted if column in frame]]
    return build(name, caption, rows.to_dict("records"))


def extreme_latents_table(run: RunFiles, page: str, *, best: bool) -> Table | None:
    """Return the ten latents of the run's SAEs with the highest or lowest adjusted F1.

    `page` is the address of the latents' page.
    """
    frame = run.explained.get(
        "latents", pd.DataFrame(columns=["sae", "latent", "all_adjusted_f1"])
    )
    frame = frame[frame["sae"].isin(run.saes)].drop_duplicates(["sae", "latent"])
    ordered = frame.sort_values("all_adjusted_f1", ascending=False, kind="stable")
    extreme = ordered[:EXTREME] if best else ordered[EXTREME:][-EXTREME:][::-1]
    return build(
        "best_latents" if best else "worst_latents",
        f"The {EXTREME} {'best' if best else 'worst'} explained latents, by adjusted F1 of one "
        "explanation for all layers",
        [
            {
                "sae": row["sae"],
                "latent": row["latent"],
                "latent_link": f"{page}#{quote(row['sae'])}/{row['latent']}",
                "adjusted_f1": row["all_adjusted_f1"],
                "lexicality": row["lexicality"],
                "labels_of": row["labels"],
                "kind_of": row["kind"],
                "explanation": row["explanation"],
            }
            for row in extreme.to_dict("records")
        ],
    )


# the tables of four sections of the page
QUALITY_TABLES = baselines_table, groupings_table
LAYER_TABLES = layers_table, scale_table, variants_table, similarity_table
COST_TABLES = parts_table, saved_table, sharing_table
EXPLAINED_TABLES = explained_table, judged_table, meaning_table, matched_table
