"""Several runs side by side: seeds of one configuration together, others against each other."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from groupsae.config.identity import decisive
from groupsae.reporting.figures import UNITS, Captioned
from groupsae.reporting.formatting import METRICS
from groupsae.reporting.load import Interval, RunFiles, cost_of, interval
from groupsae.reporting.style import COLOURS, LINES, MARKERS, legend_below, new_axes
from groupsae.reporting.tables import BASELINES, COLUMNS, Table, build, estimates

LONG = 40  # characters of a legend's label that leave no room for a second column


class Family(NamedTuple):
    """Runs that differ in their seed only.

    Attributes:
        label: short and unique among those compared.
        runs: in the order given.
    """

    label: str
    runs: list[RunFiles]

    @property
    def seeds(self) -> int:
        """How many of the runs were evaluated."""
        return sum(bool(run.groupings) for run in self.runs)


def families(runs: Sequence[RunFiles]) -> list[Family]:
    """Return the runs by configuration without the seed, and by what they were evaluated on."""
    found: dict[str, list[RunFiles]] = {}
    for run in runs:
        kept = decisive(run.config, ("seed", "hydra")) or str(run.folder)
        key = json.dumps([kept, run.plan.get("last_layer"), measured_on(run)], default=str)
        found.setdefault(key, []).append(run)
    for depth in (1, 2, 3):
        labels = [_label(members[0], depth) for members in found.values()]
        if len(set(labels)) == len(labels):
            break
    else:
        labels = [f"{label} ({i})" for i, label in enumerate(labels, 1)]
    return [Family(*pair) for pair in zip(labels, found.values(), strict=True)]


def _label(run: RunFiles, depth: int) -> str:
    *_, model, grouping, name = ("", "", "", *run.folder.parts)
    stem = re.sub(r"-s\d+-[0-9a-f]{8}$", "", name)
    return ", ".join([grouping, stem, model][:depth])


# ---- were they evaluated alike? -----------------------------------------------------------------


def measured_on(run: RunFiles) -> dict[str, str]:
    """Return what the values of an evaluation depend on besides the SAEs; nothing before one."""
    e = run.evaluation
    if not e:
        return {}
    norms = e.get("max_norm_ratio")
    return {
        "model": str(e.get("model")) + (f" at {e['revision']}" if e.get("revision") else ""),
        "text": str(e.get("text", "unknown"))[:8],
        "held-out tokens": f"{e['tokens']:,}",
        "context": str(e.get("context")),
        "special tokens": "left out" if e.get("exclude_special_tokens") else "counted",
        "first positions left out": str(e.get("skip_positions") or "none"),
        "norms left out": f"above {norms:g} medians" if norms else "none",
        "read at": " of the ".join(str(e[key]) for key in ("hookpoint", "stack") if e.get(key)),
    }


def differing(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Return what differs between the evaluations of runs -> the values, the first run's first."""
    evaluated = [values for run in runs if (values := measured_on(run))]
    found = {key: list(dict.fromkeys(v[key] for v in evaluated)) for key in (evaluated or [{}])[0]}
    return {key: values for key, values in found.items() if len(values) > 1}


def not_alike(runs: Sequence[RunFiles]) -> str | None:
    """Return a warning that names what differs between the evaluations of runs, if they do."""
    what = "; ".join(f"{key}: {' and '.join(values)}" for key, values in differing(runs).items())
    return what and (
        f"The runs were not evaluated alike ({what}): differences between them may come from "
        "that, not from the SAEs. Evaluate them alike, with python -m groupsae.evaluate."
    )


# ---- tables -------------------------------------------------------------------------------------


def runs_table(runs: Sequence[RunFiles], names: Sequence[str]) -> Table | None:
    """Return one row per run; rows of runs that were evaluated unlike the first are marked."""
    unlike, rows, marked = differing(runs), [], []
    first = next((where for run in runs if (where := measured_on(run))), {})
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        where = measured_on(run)
        if where and where != first:
            marked.append(i)
        on = "; ".join(f"{key}: {where[key]}" for key in unlike) if where else ""
        kinds = {str(sae.get("architecture")) for sae in run.evaluation.get("saes", [])}
        chosen = run.chosen or {}
        rows.append(
            {
                "run": name,
                "grouping": "imported"
                if run.imported
                else chosen.get("name") or run.plan.get("rule"),
                "architecture": ", ".join(sorted(kinds)) or None,
                "seed": run.seed,
                "num_groups": None if run.imported else len(run.groups),
                "amad": run.amad,
                "l0": _l0(run),
                **estimates(run.grouped_layers or run.summary, "fvu", "delta_ce"),
                "flops_saved": run.saving,
                "tokens": run.summary.get("tokens"),
                "measured_on": (on or None)
                if where
                else "not evaluated: FVU of all layers at the end of training",
            }
        )
    return build(
        "runs",
        "The runs; FVU and ΔCE are means over the grouped layers on held-out text",
        rows,
        marked,
    )


def _l0(run: RunFiles) -> float | None:
    """Return the mean L0 over the layers of the grouping that the report is about."""
    rows = run.layer_results(run.chosen).values()
    found = [value.value for row in rows if (value := interval(row.get("l0")))]
    return sum(found) / len(found) if found else None


def seeds_table(found: Sequence[Family]) -> Table | None:
    """Return mean and range over the seeds of each grouping, for configurations with several."""
    rows: list[dict[str, Any]] = []
    marked = []
    for family in found:
        chosen = {run.chosen["name"] for run in family.runs if run.chosen is not None}
        names = dict.fromkeys(g["name"] for run in family.runs for g in run.groupings)
        for name in names if family.seeds > 1 else ():
            if name in chosen:
                marked.append(len(rows))
            lost = {m: spread(_gaps(family, m, name, "per_layer")) for m in METRICS}
            rows.append(
                {
                    "configuration": f"{family.label}, {family.seeds} seeds",
                    "grouping": name,
                    **estimates({m: over_seeds(family, m, name) for m in METRICS}, *METRICS),
                    **estimates(lost, *METRICS, suffix="_lost"),
                }
            )
    return build("seeds", "Over seeds: mean and range; lost: by sharing", rows, marked)


def seeds_baselines_table(found: Sequence[Family]) -> Table | None:
    """Return the chosen grouping minus each baseline over seeds, each seed within itself."""
    rows = []
    for family in found:
        for kind, against in BASELINES.items():
            for metric in METRICS if family.seeds > 1 else ():
                gaps = []
                for run in family.runs:
                    other, values = run.baseline(kind), means(run, metric)
                    if run.chosen is not None and other is not None:
                        gaps.append(values[run.chosen["name"]].value - values[other["name"]].value)
                if gaps:
                    rows.append(
                        {
                            "configuration": f"{family.label}, {family.seeds} seeds",
                            "against": against,
                            "metric": COLUMNS[metric].heading,
                            **estimates({"difference": spread(gaps)}, "difference"),
                            "lower_in": f"{sum(gap < 0 for gap in gaps)} of {len(gaps)}",
                        }
                    )
    return build(
        "seeds_baselines",
        "Over seeds: the chosen grouping minus each baseline, mean and range (lower is better)",
        rows,
    )


def means(run: RunFiles, metric: str) -> dict[str, Interval]:
    """Return grouping name -> mean over the grouped layers."""
    found = {g["name"]: interval(g["grouped_layers"].get(metric)) for g in run.groupings}
    return {name: value for name, value in found.items() if value is not None}


def spread(values: Sequence[float]) -> Interval | None:
    """Return mean, smallest and largest of values over seeds; None without any."""
    return Interval(sum(values) / len(values), min(values), max(values)) if values else None


def over_seeds(family: Family, metric: str, name: str) -> Interval | None:
    """Return a grouping's metric over the seeds: mean and range."""
    return spread([v[name].value for run in family.runs if name in (v := means(run, metric))])


def _gaps(family: Family, metric: str, name: str, other: str) -> list[float]:
    """Return one grouping minus another, each seed within itself."""
    found = [means(run, metric) for run in family.runs] if name != other else []
    return [v[name].value - v[other].value for v in found if name in v and other in v]


# ---- figures ------------------------------------------------------------------------------------


def runs_figures(found: Sequence[Family]) -> Iterator[Captioned]:
    """Yield the figures of several runs together."""
    for metric, name in METRICS.items():
        figure = against_cost(found, metric)
        if figure is not None:
            title = f"{name} against relative cost, all runs"
            yield Captioned(
                f"{metric}_runs",
                "runs",
                figure,
                title,
                f"{title}; one colour per configuration. Towards the lower left: better and "
                "cheaper. Several seeds are shown by mean and range, single runs with their "
                "confidence interval.",
            )


def against_cost(found: Sequence[Family], metric: str) -> Figure | None:
    """Return a metric of all groupings of all runs against relative cost.

    One colour per configuration; marks and lines tell the rules and baselines apart. Several seeds
    are shown by their mean and range, a single one by its confidence interval.
    """
    figure, axes = new_axes(6.4, 4.6)
    labels = [f"{f.label} ({f.seeds} seeds, range)" if f.seeds > 1 else f.label for f in found]
    for i, family in enumerate(found):
        colour, labelled = COLOURS[i % len(COLOURS)], False
        for (marker, line), names in _series(family).items():
            points = sorted(p for name in names if (p := _point(family, metric, name)))
            if not points:
                continue
            x, y, low, high = zip(*points, strict=True)
            below = [b - a for a, b in zip(low, y, strict=True)]
            above = [b - a for a, b in zip(y, high, strict=True)]
            axes.errorbar(
                x,
                y,
                [below, above],
                marker=marker,
                ms=9 if marker == "*" else 5,
                ls=line if len(x) > 1 else "",
                mfc="white" if marker == "s" else colour,
                lw=1.4,
                capsize=2.5,
                color=colour,
                label=None if labelled else labels[i],
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
        title=f"{METRICS[metric]} against cost, all runs",
    )
    axes.xaxis.set_major_formatter("{x:.0%}")
    legend_below(figure, columns=1 if max(map(len, labels)) > LONG else 2)
    return figure


def _series(family: Family) -> dict[tuple[str, str], dict[str, None]]:
    """Return (marker, style of the line that joins them) -> names of groupings."""
    series: dict[tuple[str, str], dict[str, None]] = {}
    for run in family.runs:
        for grouping in run.groupings:
            rule = (grouping.get("rules") or [""])[0]
            by_rule = (MARKERS.get(rule, "o"), LINES.get(rule, "-"))
            baselines = {"per_layer": ("*", ""), "smaller": ("D", "")}
            look = baselines.get(grouping["kind"], by_rule)
            series.setdefault(look, {})[grouping["name"]] = None
    return series


def _point(family: Family, metric: str, name: str) -> tuple[float, float, float, float] | None:
    """Return cost, value and the ends of its bar."""
    groupings = [g for run in family.runs for g in run.groupings if g["name"] == name]
    costs = [cost for g in groupings if (cost := cost_of(g)) is not None]
    values = over_seeds(family, metric, name)
    if not costs or values is None:
        return None
    if family.seeds == 1:
        (values,) = (v for run in family.runs if (v := means(run, metric).get(name)))
    return sum(costs) / len(costs), values.value, *values.bounds
