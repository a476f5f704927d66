"""Figures of what sharing costs: quality against groups, AMAD and relative cost."""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from groupsae.reporting.formatting import NAMES
from groupsae.reporting.load import Interval, RunFiles, interval
from groupsae.reporting.style import (
    CHOSEN,
    COLOURS,
    MARKERS,
    PER_LAYER,
    RULE_NAMES,
    RULES,
    SMALLER,
    bars,
    legend_below,
    line_with_band,
    new_axes,
)

Grouping = Mapping[str, Any]
UNITS = {
    "fvu": "FVU (share of variance lost)",
    "delta_ce": "ΔCE (nats per token)",
}


def cost_of(grouping: Grouping) -> float | None:
    """Return the FLOPs relative to one full-width SAE per layer at equal tokens."""
    cost = (grouping.get("cost") or {}).get("flops")
    return None if cost is None else float(cost)


def against_groups(run: RunFiles, metric: str) -> Figure:
    """Return a metric against the number of groups, one line per rule."""
    figure, axes = new_axes()
    _lines(axes, run, _grouped(metric), lambda g: float(g["num_groups"]))
    _mark(axes, run, _grouped(metric), lambda g: float(g["num_groups"]))
    axes.set(xlabel="number of groups G", ylabel=UNITS[metric], title=f"{NAMES[metric]} against G")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure)
    return figure


def against_amad(run: RunFiles, metric: str) -> Figure:
    """Return a metric against AMAD, one line per rule, with the threshold."""
    figure, axes = new_axes()
    _lines(axes, run, _grouped(metric), lambda g: g.get("amad"))
    _mark(axes, run, _grouped(metric), lambda g: g.get("amad"))
    if run.theta is not None:
        axes.axvline(run.theta, color="0.4", lw=1, ls=":", label=f"θ = {run.theta:g}")
    axes.set(
        xlabel="AMAD (fractions of π)",
        ylabel=UNITS[metric],
        xlim=(0, None),
        title=f"{NAMES[metric]} against AMAD",
    )
    legend_below(figure)
    return figure


def against_cost(run: RunFiles, metric: str) -> Figure:
    """Return a metric against relative cost: groups of every rule, and all baselines."""
    figure, axes = new_axes()
    _lines(axes, run, _grouped(metric), cost_of)
    _mark(axes, run, _grouped(metric), cost_of)
    axes.set(
        xlabel="FLOPs relative to one SAE per layer",
        ylabel=UNITS[metric],
        title=f"{NAMES[metric]} against cost",
    )
    axes.xaxis.set_major_formatter("{x:.0%}")
    legend_below(figure)
    return figure


def lost(run: RunFiles, metric: str) -> Figure:
    """Return the paired difference from one SAE per layer against the number of groups."""
    figure, axes = new_axes()

    def read(grouping: Grouping) -> Interval | None:
        return interval((grouping.get("against_per_layer") or {}).get(metric))

    axes.axhline(0, color=PER_LAYER, lw=1, ls="--", label="one SAE per layer")
    _lines(axes, run, read, lambda g: float(g["num_groups"]), reference=False)
    _mark(axes, run, read, lambda g: float(g["num_groups"]))
    axes.set(
        xlabel="number of groups G",
        ylabel=f"change of {UNITS[metric]}",
        title=f"{NAMES[metric]} lost by sharing",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure)
    return figure


def _grouped(metric: str) -> Callable[[Grouping], Interval | None]:
    return lambda grouping: interval((grouping.get("grouped_layers") or {}).get(metric))


def _lines(
    axes: Axes,
    run: RunFiles,
    read: Callable[[Grouping], Interval | None],
    where: Callable[[Grouping], float | None],
    *,
    reference: bool = True,
) -> None:
    """Draw one line per rule, smaller SAEs as diamonds and one SAE per layer as a level."""
    rules = list(
        dict.fromkeys(r for g in run.groupings if g["kind"] == "groups" for r in g["rules"])
    )
    for position, rule in enumerate(rules):
        members = [
            g for g in run.groupings if g["kind"] != "smaller" and rule in (g["rules"] or [])
        ]
        points = _points(members, read, where)
        if points:
            colour = COLOURS[RULES.get(rule, position % len(COLOURS))]
            x, values = [p[0] for p in points], [p[1] for p in points]
            line_with_band(
                axes,
                x,
                values,
                colour=colour,
                marker=MARKERS.get(rule, "o"),
                label=RULE_NAMES.get(rule, rule),
            )
    per_layer = read(run.per_layer) if run.per_layer is not None and reference else None
    if per_layer is not None:
        axes.axhline(per_layer.value, color=PER_LAYER, lw=1, ls="--", label="one SAE per layer")
    smaller = _points([g for g in run.groupings if g["kind"] == "smaller"], read, where)
    if smaller:
        x, values = [p[0] for p in smaller], [p[1] for p in smaller]
        axes.errorbar(
            x,
            [v.value for v in values],
            bars(values),
            fmt="D",
            ms=6,
            color=SMALLER,
            mec="black",
            mew=0.7,
            ecolor=SMALLER,
            capsize=3,
            label="smaller SAEs",
        )


def _mark(
    axes: Axes,
    run: RunFiles,
    read: Callable[[Grouping], Interval | None],
    where: Callable[[Grouping], float | None],
) -> None:
    """Draw a ring around the grouping that the run chose."""
    if run.chosen is None:
        return
    for x, value in _points([run.chosen], read, where):
        label = "AMAD's choice" if run.chosen.get("chosen_by") else "this run"
        axes.plot([x], [value.value], "o", ms=13, mfc="none", mec=CHOSEN, mew=2, label=label)


def _points(
    groupings: list[dict[str, Any]],
    read: Callable[[Grouping], Interval | None],
    where: Callable[[Grouping], float | None],
) -> list[tuple[float, Interval]]:
    """Return (x, value) from left to right.

    So no line turns back, though even spacing may be less close with more groups.
    """
    found = []
    for grouping in groupings:
        x, value = where(grouping), read(grouping)
        if x is not None and value is not None:
            found.append((float(x), value))
    return sorted(found, key=lambda point: point[0])
