"""One grouping against another: paired differences, and how they are put into words."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from groupsae.reporting.formatting import METRICS, NAMES, UNIT, number, within
from groupsae.reporting.load import Interval, RunFiles, interval
from groupsae.reporting.quality import cost_of


class Comparison(NamedTuple):
    """The chosen grouping minus another one, over the grouped layers.

    Attributes:
        differences: metric -> difference with its interval.
        paired: whether the interval is that of paired resamples; else it is made from both
            groupings' intervals against one SAE per layer, which is too wide rather than too
            narrow.
    """

    differences: dict[str, Interval]
    paired: bool


def compare(run: RunFiles, baseline: Mapping[str, Any]) -> Comparison | None:
    """Return the chosen grouping minus a baseline, or None if nothing relates the two."""
    chosen = run.chosen
    if chosen is None:
        return None
    for row in (run.evaluation or {}).get("comparisons") or []:
        if row["grouping"] == chosen["name"] and row["baseline"] == baseline["name"]:
            found = {m: v for m in METRICS if (v := interval(row.get(m))) is not None}
            return Comparison(found, True) if found else None
    differences = {}
    for metric in METRICS:
        own = interval((chosen.get("against_per_layer") or {}).get(metric))
        other = interval((baseline.get("against_per_layer") or {}).get(metric))
        if own is not None and other is not None:
            (low, high), (other_low, other_high) = own.bounds, other.bounds
            known = None not in (own.low, other.low)
            differences[metric] = Interval(
                own.value - other.value,
                low - other_high if known else None,
                high - other_low if known else None,
            )
    return Comparison(differences, False) if differences else None


def saving(run: RunFiles) -> float | None:
    """Return the share of FLOPs that the chosen grouping saves against one SAE per layer."""
    cost = cost_of(run.chosen) if run.chosen is not None else None
    if cost is not None:
        return 1 - cost
    stored = (run.ledger or {}).get("saving", {}).get("flops")
    if stored is None:
        stored = ((run.summary or {}).get("cost") or {}).get("saving")
    return None if stored is None else float(stored)


def against_in_words(run: RunFiles, kind: str) -> str:
    """Return how the chosen groups do against `even` groups or `smaller` SAEs of equal cost."""
    names = {"even": "evenly spaced groups", "smaller": "smaller SAEs on every layer"}
    where = {"even": "at the same number of groups", "smaller": "at equal cost"}
    baseline = run.baseline(kind)
    if run.chosen is None:
        return ""
    if baseline is None:
        return _absent(run, kind)
    if baseline is run.chosen:
        return "The chosen groups are the evenly spaced ones: there is nothing to compare."
    compared = compare(run, baseline)
    if compared is None:
        return ""
    known = {m: d for m, d in compared.differences.items() if d.low is not None}
    signs = {d.sign for d in known.values()}
    if not signs:
        lead = f"Against {names[kind]} {where[kind]}"
    elif signs == {-1}:
        lead = f"The chosen groups beat {names[kind]} {where[kind]}"
    elif signs == {1}:
        lead = f"The chosen groups lose to {names[kind]} {where[kind]}"
    elif signs == {0}:
        lead = f"The chosen groups and {names[kind]} {where[kind]} are not distinguishable"
    elif signs == {-1, 0}:
        lead = f"The chosen groups do better than {names[kind]} {where[kind]}, in part"
    elif signs == {1, 0}:
        lead = f"The chosen groups do worse than {names[kind]} {where[kind]}, in part"
    else:
        lead = f"Against {names[kind]} {where[kind]} the result is mixed"
    parts = "; ".join(change_in_words(NAMES[m], d, m) for m, d in compared.differences.items())
    how = "" if compared.paired or not known else " The intervals are cautious, not paired."
    return f"{lead}: {parts}.{how}"


def change_in_words(name: str, change: Interval, metric: str) -> str:
    """Return one difference, with its interval: higher, lower or not distinguishable."""
    unit = UNIT[metric]
    if change.low is None:
        return f"{name} differs by {number(change.value, 4)}{unit} (no interval)"
    if change.sign == 0:
        return f"{name} is not distinguishable (difference {within(change, metric)}{unit})"
    if change.sign > 0:
        return f"{name} is higher by {within(change, metric)}{unit}"
    low, high = change.bounds
    return f"{name} is lower by {within(Interval(-change.value, -high, -low), metric)}{unit}"


def _absent(run: RunFiles, kind: str) -> str:
    """Say how a baseline is had, in a run that has others."""
    if kind != "even" or run.per_layer is None or run.chosen is run.per_layer:
        return ""
    return "Evenly spaced groups were not trained: groups.rules=[complete,even] trains them too."
