"""Several runs side by side: seeds of one configuration together, others against each other."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd  # type: ignore[import-untyped,unused-ignore]
from matplotlib.figure import Figure

from groupsae.config.identity import content
from groupsae.reporting.figures import UNITS, Captioned
from groupsae.reporting.formatting import METRICS
from groupsae.reporting.load import RunFiles, value_of
from groupsae.reporting.style import COLOURS, LINES, MARKERS, bars, legend_below, new_axes
from groupsae.reporting.tables import (
    Table,
    baselines_table,
    build,
    estimates,
    groupings_table,
    points,
)

LONG = 40  # characters of a legend's label that leave no room for a second column


@dataclass(frozen=True)
class Family:
    """Runs that differ in their seed only."""

    label: str  # short and unique among those compared
    runs: list[RunFiles]

    @cached_property
    def evaluated(self) -> list[RunFiles]:
        """The runs that were evaluated."""
        return [run for run in self.runs if run.groupings]

    @cached_property
    def groupings(self) -> pd.DataFrame:
        """Every grouping: mean and range over the seeds; of a single run, with its intervals."""
        frames = [table.frame for run in self.evaluated if (table := groupings_table(run))]
        if len(frames) < 2:
            return frames[0] if frames else pd.DataFrame({"kind": [], "rule": []})
        values = ("flops", *METRICS, *(f"{metric}_lost" for metric in METRICS))
        found = over_seeds(frames, ["grouping", "kind", "rule"], values)
        return found.drop(columns=["flops_low", "flops_high"], errors="ignore")


def families(runs: Sequence[RunFiles]) -> list[Family]:
    """Return the runs by configuration without the seed, and by their evaluation data."""
    found: dict[str, list[RunFiles]] = {}
    for run in runs:
        kept = content(run.config, ("seed", "hydra")) if run.config else str(run.folder)
        key = json.dumps([kept, run.plan["last_layer"], measured_on(run)], default=str)
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


def over_seeds(
    frames: Sequence[pd.DataFrame], keys: list[str], values: Sequence[str]
) -> pd.DataFrame:
    """Return mean, smallest (`_low`) and largest (`_high`) value of each row over seeds."""
    rows = pd.concat(frames).groupby(keys, sort=False)
    columns: dict[str, pd.Series] = {}
    for value in values:
        if all(value in frame for frame in frames):
            group = rows[value]
            columns |= {value: group.mean(), f"{value}_low": group.min()}
            columns[f"{value}_high"] = group.max()
    return pd.DataFrame(columns).reset_index()


# ---- were they evaluated alike? -----------------------------------------------------------------


def measured_on(run: RunFiles) -> dict[str, str]:
    """Return the settings that an evaluation depends on besides the SAEs; empty before one."""
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
    """Return setting that differs between evaluations -> its values, the first run's first."""
    evaluated = [values for run in runs if (values := measured_on(run))]
    found = {key: list(dict.fromkeys(v[key] for v in evaluated)) for key in (evaluated or [{}])[0]}
    return {key: values for key, values in found.items() if len(values) > 1}


def not_alike(runs: Sequence[RunFiles]) -> str:
    """Return a warning that names the differences between the evaluations of runs, or nothing."""
    what = "; ".join(f"{key}: {' and '.join(values)}" for key, values in differing(runs).items())
    return what and (
        f"The runs were not evaluated alike ({what}): differences between them may come from "
        "that, not from the SAEs. Evaluate them with the same evaluation options. Where the text "
        "differs, train or import one again with the other's data and stream options; an import "
        "of SAEs that groupsae exported takes the stream options by itself."
    )


# ---- tables -------------------------------------------------------------------------------------


def runs_table(runs: Sequence[RunFiles], names: Sequence[str]) -> Table | None:
    """Return one row per run; rows of runs that were evaluated unlike the first are marked."""
    unlike, marked = differing(runs), []
    rows: list[dict[str, Any]] = []
    first = next((where for run in runs if (where := measured_on(run))), {})
    for run, name in zip(runs, names, strict=True):
        where = measured_on(run)
        if where and where != first:
            marked.append(len(rows))
        on = "; ".join(f"{key}: {where[key]}" for key in unlike if where) or None
        kinds = {str(sae["architecture"]) for sae in run.evaluation.get("saes", [])}
        l0 = [value_of(row.get("l0")) for row in run.layer_results(run.chosen).values()]
        known = [value for value in l0 if value is not None]
        grouping = (run.chosen or {}).get("name", run.plan["rule"])
        rows.append(
            {
                "run": name,
                "grouping": "imported" if run.imported else grouping,
                "architecture": ", ".join(sorted(kinds)) or None,
                "seed": run.seed,
                "num_groups": None if run.imported else len(run.groups),
                "amad": run.amad,
                "l0": sum(known) / len(known) if known else None,
                **estimates(run.grouped_layers or run.summary, *METRICS),
                "flops_saved": run.saving,
                "tokens": run.summary.get("tokens"),
                "measured_on": on if where else "not evaluated: FVU of all layers, in training",
            }
        )
    return build(
        "runs",
        "The runs; FVU and ΔCE are means over the grouped layers on held-out text",
        rows,
        marked,
    )


def seeds_table(found: Sequence[Family]) -> Table | None:
    """Return mean and range over the seeds of each grouping, for configurations with several."""
    frames = [_labelled(f, f.groupings) for f in found if len(f.evaluated) > 1]
    return _table("seeds", "Over seeds: mean and range; lost: by sharing", frames)


def seeds_baselines_table(found: Sequence[Family]) -> Table | None:
    """Return the chosen grouping minus each baseline over seeds, each seed within itself."""
    frames = []
    for family in found:
        parts = [table.frame for run in family.evaluated if (table := baselines_table(run))]
        if len(parts) > 1:
            keys = ["against", "metric"]
            frame = over_seeds(parts, keys, ["difference"])
            gaps = pd.concat(parts).groupby(keys, sort=False)["difference"]
            lower = gaps.agg(lambda values: f"{(values < 0).sum()} of {len(values)}")
            frames.append(_labelled(family, frame.assign(lower_in=lower.to_numpy())))
    caption = "Over seeds: the chosen grouping minus each baseline, mean and range"
    return _table("seeds_baselines", f"{caption} (lower is better)", frames)


def _labelled(family: Family, frame: pd.DataFrame) -> pd.DataFrame:
    label = f"{family.label}, {len(family.evaluated)} seeds"
    return pd.concat([pd.Series([label] * len(frame), name="configuration"), frame], axis=1)


def _table(name: str, caption: str, frames: Sequence[pd.DataFrame]) -> Table | None:
    return Table(name, caption, pd.concat(frames, ignore_index=True)) if frames else None


# ---- figures ------------------------------------------------------------------------------------


def runs_figures(found: Sequence[Family]) -> Iterator[Captioned]:
    """Yield the figures of several runs together."""
    for metric, name in METRICS.items():
        if figure := against_cost(found, metric):
            yield Captioned(
                f"{metric}_runs",
                "runs",
                figure,
                f"{name} against relative cost, all runs; one colour per configuration. Towards "
                "the lower left: better and cheaper. Several seeds are shown by mean and range, "
                "single runs with their confidence interval.",
            )


def against_cost(found: Sequence[Family], metric: str) -> Figure | None:
    """Return a metric of all groupings of all runs against relative cost.

    One colour per configuration; marks and lines distinguish rules and baselines. Several seeds
    are shown by their mean and range, a single one by its confidence interval.
    """
    figure, axes = new_axes(6.4, 4.6)
    labels = []
    for i, family in enumerate(found):
        seeds, colour = len(family.evaluated), COLOURS[i % len(COLOURS)]
        label: str | None = f"{family.label} ({seeds} seeds, range)" if seeds > 1 else family.label
        labels.append(label or "")
        for (kind, rule), frame in family.groupings.groupby(["kind", "rule"], sort=False):
            by_rule = (MARKERS.get(rule, "o"), LINES.get(rule, "-"))
            marker, line = {"per_layer": ("*", ""), "smaller": ("D", "")}.get(kind, by_rule)
            x, y, low, high = points(frame, "flops", metric)
            if not len(x):
                continue
            axes.errorbar(
                x,
                y,
                bars(y, low, high),
                marker=marker,
                ms=9 if marker == "*" else 5,
                ls=line if len(x) > 1 else "",
                mfc="white" if marker == "s" else colour,
                lw=1.4,
                capsize=2.5,
                color=colour,
                label=label,
            )
            label = None  # once per configuration
    if not axes.containers:
        return None
    for marker, line, name in (
        ("*", "", "one SAE per layer"),
        ("D", "", "smaller SAEs"),
        ("s", LINES["even"], "evenly spaced"),
    ):
        look: dict[str, Any] = {"ms": 8 if marker == "*" else 5, "color": "0.5", "ls": line}
        axes.plot(
            [], [], marker=marker, mfc="white" if marker == "s" else "0.5", label=name, **look
        )
    axes.set(
        xlabel="FLOPs relative to one SAE per layer of the same kind",
        ylabel=UNITS[metric],
        title=f"{METRICS[metric]} against cost, all runs",
    )
    axes.xaxis.set_major_formatter("{x:.0%}")
    legend_below(figure, columns=1 if max(map(len, labels)) > LONG else 2)
    return figure
