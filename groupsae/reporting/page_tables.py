"""The tables of the page, as plain cells."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from groupsae.reporting.formatting import DIGITS, NONE, number, percent, spans, within
from groupsae.reporting.load import Interval, RunFiles, interval
from groupsae.reporting.per_layer import similarities
from groupsae.reporting.quality import cost_of
from groupsae.reporting.style import RULE_NAMES

JOIN = "\N{WORD JOINER}"  # no line ends inside a span of layers


class Cell(NamedTuple):
    """A value and what stands small beside it, such as its interval."""

    value: str
    note: str = ""


@dataclass
class Table:
    """A table of the page.

    Attributes:
        caption: what it holds.
        columns: headings; the first `text` of them are left-aligned, the others are numbers.
        rows: cells.
        text: number of columns with text.
        marked: indices of the rows that are set off.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    text: int = 1
    marked: list[int] = field(default_factory=list)


def cell(stored: Any, metric: str) -> Cell:
    """Return a value with its interval as the note."""
    found = stored if isinstance(stored, Interval) else interval(stored)
    if found is None:
        return Cell(NONE)
    digits = DIGITS.get(metric, 4)
    if found.low is None or found.high is None:
        return Cell(number(found.value, digits))
    return Cell(
        number(found.value, digits), f"{number(found.low, digits)} to {number(found.high, digits)}"
    )


def layers_table(run: RunFiles) -> Table | None:
    """Return the figures of every layer with the SAE of its group."""
    metrics = ("fvu", "delta_ce", "delta_ce_percent", "ce_score", "kl")
    names = ["FVU", "ΔCE, nats", "ΔCE, %", "CE score", "KL, nats"]
    table = Table("Every layer with the SAE of its group", ["layer", "SAE", *names, "L0"], text=2)
    for layer, sae, result in _served(run):
        l0 = interval(result.get("l0"))
        table.rows.append(
            [
                Cell(str(layer)),
                Cell(sae),
                *(cell(result.get(m), m) for m in metrics),
                Cell(number(l0 and l0.value, 1)),
            ]
        )
    return table if table.rows else None


def scale_table(run: RunFiles) -> Table | None:
    """Return the CE with a layer ablated: the ends of the scale that a CE score is on."""
    e = run.evaluation or {}
    if interval(e.get("ce")) is None:  # it predicts no next token
        return None
    table = Table(
        f"What the language model's CE, {within(e.get('ce'), 'ce')} nats, becomes with a layer "
        "set to zero (where the CE score is 0) or to its mean",
        ["layer", "CE at zero, nats", "CE at the mean, nats", "RMS norm"],
    )
    for row in e.get("layers", []):
        norm = Cell(number(row.get("rms_norm"), 2))
        ends = (cell(row.get(key), "ce") for key in ("ce_zero", "ce_mean"))
        table.rows.append([Cell(str(row["layer"])), *ends, norm])
    return table if table.rows else None


def variants_table(run: RunFiles) -> Table | None:
    """Return reconstruction as other tools name and count it."""
    keys = {
        "fvu": "FVU",
        "explained_variance_legacy": "EV legacy",
        "explained_variance_dictionary_learning": "EV dictionary_learning",
        "explained_variance_saebench": "EV saebench",
        "mse": "MSE",
        "cosine": "cosine",
        "norm_ratio": "norm ratio",
        "relative_bias": "relative bias",
    }
    table = Table(
        "Reconstruction in the definitions of other tools (EV: explained variance)",
        ["layer", *keys.values()],
    )
    for layer, _, result in _served(run):
        values = {key: interval(result.get(key)) for key in keys}
        table.rows.append(
            [
                Cell(str(layer)),
                *(
                    Cell(number(v and v.value, 2 if key == "mse" else 4))
                    for key, v in values.items()
                ),
            ]
        )
    return table if table.rows else None


def groupings_table(run: RunFiles) -> Table | None:
    """Return every grouping with quality over the grouped layers, and cost."""
    table = Table(
        "Every grouping: mean over the grouped layers, and the change against one SAE per layer"
        if len(run.groupings) > 1
        else "Mean over the grouped layers; cost against one SAE per layer",
        ["grouping", "groups", "G", "AMAD", "FLOPs", "seconds", "FVU", "ΔCE, nats", "ΔCE, %"],
        text=2,
    )
    paired = any(g.get("against_per_layer") for g in run.groupings)
    table.columns += ["FVU lost", "ΔCE lost, nats"] if paired else []
    for i, grouping in enumerate(run.groupings):
        means, lost = grouping["grouped_layers"], grouping.get("against_per_layer") or {}
        if grouping is run.chosen:
            table.marked.append(i)
        table.rows.append(
            [
                Cell(grouping["name"], _made_by(grouping, grouping is run.chosen)),
                Cell(
                    "one each"
                    if grouping["kind"] != "groups"
                    else spans([list(g) for g in grouping["groups"]]).replace(NONE, NONE + JOIN)
                ),
                Cell(str(grouping["num_groups"])),
                Cell(number(grouping.get("amad"), 3)),
                Cell(percent(cost_of(grouping), 0)),
                Cell(percent((grouping.get("cost") or {}).get("seconds"), 0)),
                *(cell(means.get(m), m) for m in ("fvu", "delta_ce", "delta_ce_percent")),
                *(cell(lost.get(m), m) for m in ("fvu", "delta_ce") if paired),
            ]
        )
    return table if table.rows else None


def together_table(run: RunFiles) -> Table | None:
    """Return the effect of all layers replaced at once, where it was measured."""
    metrics = {"ce": "CE, nats", "delta_ce": "ΔCE, nats", "delta_ce_percent": "ΔCE, %", "kl": "KL"}
    table = Table("All layers replaced at once", ["grouping", *metrics.values()])
    for grouping in run.groupings:
        together = grouping.get("spliced_together")
        if together:
            table.rows.append(
                [Cell(grouping["name"]), *(cell(together.get(m), m) for m in metrics)]
            )
    return table if table.rows else None


def saes_table(run: RunFiles) -> Table | None:
    """Return every SAE that the report is about: means over its layers, and its latents."""
    saes = {s["name"]: s for s in (run.evaluation or {}).get("saes", [])}
    table = Table(
        "Each SAE: means over its layers, and its latents (specific: more than 90 % of the "
        "firings in one layer)",
        [
            "SAE",
            "FVU",
            "ΔCE, nats",
            "latents",
            "type",
            "dead",
            "dense",
            "specific",
            "mean layers in use",
        ],
    )
    for name in run.saes:
        if name in saes:
            sae = saes[name]
            profile = sae.get("profile") or {}
            shared = len(sae["layers"]) > 1
            table.rows.append(
                [
                    Cell(name),
                    *(cell(sae.get(m), m) for m in ("fvu", "delta_ce")),
                    Cell(f"{sae['d_sae']:,}"),
                    Cell(sae["architecture"]),
                    Cell(percent(sae.get("dead"))),
                    Cell(percent(sae.get("dense"))),
                    Cell(percent(profile.get("specific") if shared else None)),
                    Cell(number(profile.get("mean_effective_layers") if shared else None, 2)),
                ]
            )
    return table if table.rows else None


def similarity_table(run: RunFiles) -> Table | None:
    """Return MMCS and MMCO of every layer that shares an SAE."""
    table = Table(
        "The layer's own SAE against its group's",
        ["layer", "SAE of the group", "MMCS", "MMCO"],
        text=2,
    )
    for layer, row in similarities(run).items():
        values = (Cell(number(row.get(key), 3)) for key in ("mmcs", "mmco"))
        table.rows.append([Cell(str(layer)), Cell(row["sae"]), *values])
    return table if table.rows else None


def _served(run: RunFiles) -> Sequence[tuple[int, str, dict[str, Any]]]:
    if run.chosen is None:
        return []
    pairs = sorted((int(x), sae) for x, sae in run.chosen["sae_of_layer"].items())
    return [(x, sae, found) for x, sae in pairs if (found := run.result(sae, x)) is not None]


def _made_by(grouping: dict[str, Any], chosen: bool) -> str:
    names = [RULE_NAMES.get(rule, rule) for rule in grouping.get("rules") or []]
    if grouping["kind"] == "per_layer":
        return "one SAE per layer"
    if grouping["kind"] == "smaller":
        return "smaller SAEs on every layer"
    return ", ".join([*names, "chosen"] if chosen else names)
