"""Several runs side by side: seeds of one configuration together, others against each other."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from groupsae.reporting.collection import Captioned
from groupsae.reporting.comparison import saving
from groupsae.reporting.formatting import METRICS, NAMES, NONE, number, percent, plural
from groupsae.reporting.load import RunFiles
from groupsae.reporting.page_tables import Cell, Table, cell
from groupsae.reporting.quality import UNITS, cost_of
from groupsae.reporting.seeds import (
    Family,
    Spread,
    difference,
    differing,
    families,
    means,
    measured_on,
    not_alike,
    spread,
)
from groupsae.reporting.style import COLOURS, LINES, MARKERS, legend_below, new_axes
from groupsae.reporting.verdict import Finding, Verdict

LONG = 40  # characters of a legend's label that leave no room for a second column


def against_cost(found: Sequence[Family], metric: str) -> Figure | None:
    """Return quality against relative cost of everything that the runs hold.

    One colour per configuration; marks and lines tell the rules and baselines apart. Several seeds
    are shown by their mean and range, a single one by its confidence interval.
    """
    figure, axes = new_axes(6.4, 4.6)
    for i, family in enumerate(found):
        colour, labelled = COLOURS[i % len(COLOURS)], False
        for (marker, line), names in _series(family).items():
            points = sorted(p for name in names if (p := _point(family, metric, name)))
            if not points:
                continue
            x, y, low, high = zip(*points, strict=True)
            axes.errorbar(
                x,
                y,
                [
                    [b - a for a, b in zip(low, y, strict=True)],
                    [b - a for a, b in zip(y, high, strict=True)],
                ],
                marker=marker,
                ms=9 if marker == "*" else 5,
                ls=line if len(x) > 1 else "",
                mfc="white" if marker == "s" else colour,
                lw=1.4,
                capsize=2.5,
                color=colour,
                label=None if labelled else _seeds(family),
            )
            labelled = True
    if not axes.containers:
        return None
    for marker, line, label in (
        ("*", "", "one SAE per layer"),
        ("D", "", "smaller SAEs"),
        ("s", LINES["even"], "evenly spaced"),
    ):
        look: dict[str, Any] = {"ms": 8 if marker == "*" else 5, "color": "0.5", "ls": line}
        face = "white" if marker == "s" else "0.5"
        axes.plot([], [], marker=marker, mfc=face, label=label, **look)
    axes.set(
        xlabel="FLOPs relative to one SAE per layer of the same kind",
        ylabel=UNITS[metric],
        title=f"{NAMES[metric]} against cost, all runs",
    )
    axes.xaxis.set_major_formatter("{x:.0%}")
    legend_below(figure, columns=1 if len(max(map(_seeds, found), key=len)) > LONG else 2)
    return figure


def _series(family: Family) -> dict[tuple[str, str], list[str]]:
    """Return (marker, style of the line that joins them) -> names of groupings."""
    series: dict[tuple[str, str], list[str]] = {}
    for run in family.runs:
        for grouping in run.groupings:
            rule = (grouping.get("rules") or [""])[0]
            key = {"per_layer": ("*", ""), "smaller": ("D", "")}.get(
                grouping["kind"], (MARKERS.get(rule, "o"), LINES.get(rule, "-"))
            )
            names = series.setdefault(key, [])
            if grouping["name"] not in names:
                names.append(grouping["name"])
    return series


def _point(family: Family, metric: str, name: str) -> tuple[float, float, float, float] | None:
    costs = [
        c for r in family.runs for g in r.groupings if g["name"] == name and (c := cost_of(g))
    ]
    values = spread(family, metric, name)
    if not costs or values is None:
        return None
    low, high = values.low, values.high
    if len(family.evaluated) == 1:
        low, high = means(family.evaluated[0], metric)[name].bounds
    return sum(costs) / len(costs), values.mean, low, high


def _seeds(family: Family) -> str:
    count = len(family.evaluated)
    return f"{family.label} ({count} seeds, range)" if count > 1 else family.label


def side_by_side(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    """Return one row per run."""
    table = Table(
        "The runs; FVU and ΔCE are means over the grouped layers on held-out text",
        ["run", "grouping", "SAE", "seed", "G", "AMAD", "L0", "FVU", "ΔCE, nats"],
        text=3,
    )
    first = next((where for run in runs if (where := measured_on(run))), {})
    unlike = differing(runs)
    table.columns += ["FLOPs saved", "tokens", *(["evaluated on"] if unlike else [])]
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        where = measured_on(run)
        table.marked += [i] if where and where != first else []
        chosen: dict[str, Any] = run.chosen or {}
        values = chosen.get("grouped_layers") or {}
        fvu = values.get("fvu", (run.summary or {}).get("fvu"))
        tokens = (run.summary or {}).get("tokens")
        table.rows.append(
            [
                Cell(name),
                Cell("adopted" if run.adopted else _grouping_of(run)),
                Cell(run.kinds or NONE),
                Cell(NONE if run.seed is None or run.adopted else str(run.seed)),
                Cell(NONE if run.adopted else str(len(run.groups))),
                Cell(NONE if run.adopted else number((run.chosen or run.plan).get("amad"), 3)),
                Cell(number(run.l0, 1)),
                cell(fvu, "fvu") if chosen else Cell(cell(fvu, "fvu").value, "all layers"),
                cell(values.get("delta_ce"), "delta_ce"),
                Cell(percent(saving(run))),
                Cell(NONE if tokens is None else f"{tokens:,}"),
                *(
                    [Cell("; ".join(f"{k}: {where[k]}" for k in unlike) if where else NONE)]
                    if unlike
                    else []
                ),
            ]
        )
    return table


def _grouping_of(run: RunFiles) -> str:
    return (run.chosen or {}).get("name") or str(run.plan.get("rule", NONE))


def seeds_table(family: Family) -> Table | None:
    """Return mean and range over seeds of each grouping, and against even spacing."""
    if len(family.evaluated) < 2:
        return None
    table = Table(
        f"{family.label}: {plural(len(family.evaluated), 'seed')}, mean and range",
        ["grouping", "FVU", "ΔCE, nats", "FVU lost by sharing", "ΔCE lost by sharing, nats"],
    )
    names = list(dict.fromkeys(g["name"] for run in family.runs for g in run.groupings))
    chosen = {run.chosen["name"] for run in family.runs if run.chosen is not None}
    for i, name in enumerate(names):
        table.marked += [i] if name in chosen else []
        table.rows.append(
            [
                Cell(name),
                *(_spread_cell(spread(family, metric, name)) for metric in METRICS),
                *(
                    _spread_cell(difference(family, metric, name, "per_layer"))
                    for metric in METRICS
                ),
            ]
        )
    return table if table.rows else None


def _spread_cell(values: Spread | None) -> Cell:
    if values is None:
        return Cell(NONE)
    return Cell(number(values.mean, 4), f"{number(values.low, 4)} to {number(values.high, 4)}")


def compare_runs(
    runs: Sequence[RunFiles], names: Sequence[str]
) -> tuple[Verdict, list[Table], list[Captioned]]:
    """Return what the page says about several runs together."""
    found = families(runs)
    tables = [side_by_side(runs, names)]
    tables += [table for family in found if (table := seeds_table(family)) is not None]
    figures = []
    for metric in METRICS:
        figure = against_cost(found, metric)
        if figure is not None:
            title = f"{NAMES[metric]} against relative cost, all runs"
            caption = (
                f"{title}; one colour per configuration. Towards the lower left: better and "
                "cheaper. Several seeds are shown by mean and range, single runs with their "
                "confidence interval."
            )
            figures.append(Captioned(f"{metric}_runs", "runs", figure, title, caption))
    verdict, warning = judge_runs(found), not_alike(runs)
    if warning is not None:
        verdict.caveats.insert(0, f"{warning} The marked rows are unlike the first.")
    return verdict, tables, figures


def judge_runs(found: Sequence[Family]) -> Verdict:
    """Return the verdict on several runs: what holds over seeds."""
    count = sum(len(family.runs) for family in found)
    verdict = Verdict(f"{plural(count, 'run')} of {plural(len(found), 'configuration')}.")
    for family in found:
        chosen = [run.chosen for run in family.runs if run.chosen is not None]
        if len(chosen) < 2:
            continue
        picks = sorted({g["num_groups"] for g in chosen})
        text = (
            f"G = {' or '.join(map(str, picks))} in all seeds"
            if len(picks) == 1
            else (f"the seeds chose G from {picks[0]} to {picks[-1]}")
        )
        for kind, words in (
            ("per_layer", "one SAE per layer"),
            ("even", "evenly spaced groups"),
            ("smaller", "smaller SAEs of equal cost"),
        ):
            text += _over_seeds(family, kind, words)
        title = f"{family.label}, {plural(len(chosen), 'seed')}"
        verdict.findings.append(Finding(title, text + "."))
    verdict.caveats.append(
        "Ranges over seeds show how far training varies; intervals of single runs show how far "
        "the held-out text does. Runs of different configurations were not paired."
    )
    return verdict


def _over_seeds(family: Family, kind: str, words: str) -> str:
    """Return how the chosen groups do against a baseline over seeds, as part of a sentence."""
    text = ""
    for metric in METRICS:
        gaps = []
        for run in family.runs:
            other = run.per_layer if kind == "per_layer" else run.baseline(kind)
            values = means(run, metric)
            if other is None or run.chosen is None or other is run.chosen:
                continue
            gaps.append(values[run.chosen["name"]].value - values[other["name"]].value)
        if gaps:
            mean, lower = sum(gaps) / len(gaps), sum(gap < 0 for gap in gaps)
            lead = "; against " + words if not text else " and"
            text += (
                f"{lead} {NAMES[metric]} differs by {number(mean, 4)} "
                f"({number(min(gaps), 4)} to {number(max(gaps), 4)}; "
                f"lower in {lower} of {len(gaps)})"
            )
    return text
