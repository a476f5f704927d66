"""Runs that differ in their seed only, and what their figures have in common."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from groupsae.config.identity import decisive
from groupsae.reporting.load import Interval, RunFiles, interval


class Family(NamedTuple):
    """Runs that differ in their seed only.

    Attributes:
        label: short and unique among those compared.
        runs: in the order given.
    """

    label: str
    runs: list[RunFiles]

    @property
    def evaluated(self) -> list[RunFiles]:
        """Return those of the runs that have figures to compare."""
        return [run for run in self.runs if run.groupings]


class Spread(NamedTuple):
    """A value over seeds: mean, smallest and largest."""

    mean: float
    low: float
    high: float


def families(runs: Sequence[RunFiles]) -> list[Family]:
    """Return the runs by configuration without the seed, and by what they were evaluated on."""
    found: dict[str, list[RunFiles]] = {}
    for run in runs:
        kept = decisive(run.config, ("seed", "hydra"))
        parts = [kept or str(run.folder), run.plan.get("last_layer"), measured_on(run)]
        key = json.dumps(parts, default=str)
        found.setdefault(key, []).append(run)
    grouped = list(found.values())
    labels = [_label(members[0], depth=1) for members in grouped]
    for depth in (2, 3):
        if len(set(labels)) < len(labels):
            labels = [_label(members[0], depth) for members in grouped]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({i + 1})" for i, label in enumerate(labels)]
    return [Family(label, members) for label, members in zip(labels, grouped, strict=True)]


def measured_on(run: RunFiles) -> dict[str, str]:
    """Return what the figures of an evaluation depend on besides the SAEs; nothing before one."""
    e = run.evaluation
    if e is None:
        return {}
    return {
        "model": str(e.get("model")) + (f" at {e['revision']}" if e.get("revision") else ""),
        "text": str(e.get("text", "unknown"))[:8],
        "held-out tokens": f"{e['tokens']:,}",
        "context": str(e.get("context")),
        "special tokens": "left out" if e.get("exclude_special_tokens") else "counted",
        "first positions left out": str(e.get("skip_positions") or "none"),
        "norms left out": f"above {most:g} medians"
        if (most := e.get("max_norm_ratio"))
        else "none",
        "read at": " of the ".join(str(e[key]) for key in ("hookpoint", "stack") if e.get(key)),
    }


def differing(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Return in what the evaluations of runs differ -> the values, the first run's first."""
    found = [where for run in runs if (where := measured_on(run))]
    values = {key: list(dict.fromkeys(each[key] for each in found)) for key in (found or [{}])[0]}
    return {key: several for key, several in values.items() if len(several) > 1}


def not_alike(runs: Sequence[RunFiles]) -> str | None:
    """Return a sentence that says in what the evaluations of runs differ, if they do."""
    found = differing(runs)
    if not found:
        return None
    what = "; ".join(f"{key}: {' and '.join(values)}" for key, values in found.items())
    return (
        f"The runs were not evaluated alike ({what}): what they differ by may come from that, not "
        "from the SAEs. Evaluate them alike, with python -m groupsae.evaluate."
    )


def _label(run: RunFiles, depth: int) -> str:
    *_, model, grouping, name = ("", "", "", *run.folder.parts)
    stem = re.sub(r"-s\d+-[0-9a-f]{8}$", "", name)
    return ", ".join([grouping, stem, model][:depth])


def means(run: RunFiles, metric: str) -> dict[str, Interval]:
    """Return grouping name -> mean over the grouped layers."""
    found = {g["name"]: interval(g["grouped_layers"].get(metric)) for g in run.groupings}
    return {name: value for name, value in found.items() if value is not None}


def spread(family: Family, metric: str, name: str) -> Spread | None:
    """Return a grouping's metric over the seeds; None if no run has it."""
    values = [v[name].value for run in family.runs if name in (v := means(run, metric))]
    return Spread(sum(values) / len(values), min(values), max(values)) if values else None


def difference(family: Family, metric: str, name: str, other: str) -> Spread | None:
    """Return one grouping minus another over seeds, each seed within itself."""
    if name == other:
        return None
    found = [means(run, metric) for run in family.runs]
    gaps = [v[name].value - v[other].value for v in found if name in v and other in v]
    return Spread(sum(gaps) / len(gaps), min(gaps), max(gaps)) if gaps else None
