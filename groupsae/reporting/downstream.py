"""The tables of the parts of an evaluation that say what the model can still do.

Each is built from `evaluation/<part>.json`, `RunFiles.downstream[<part>]`, for the screen and the
report's section "What the model can still do". Every column needs a heading in `tables.HEADINGS`.
"""

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from groupsae.reporting.formatting import METRICS, plural
from groupsae.reporting.load import RunFiles, Values, value_of
from groupsae.reporting.tables import HEADINGS, Table, build, distinguishable, estimates

Build = Callable[[RunFiles], Table | None]
LATENTS = 3  # of each task


def lost_table(run: RunFiles) -> Table | None:
    """Return what the chosen grouping loses against one SAE per layer, by every measure.

    A loss is distinguishable if the interval of the difference, which is paired, leaves out 0.
    """
    if not run.downstream:
        return None
    rows = []
    chosen = (run.chosen or {}).get("against_per_layer") or {}
    found: list[tuple[str, str, Any]] = [
        ("held-out text", metric, chosen[metric]) for metric in METRICS if metric in chosen
    ]
    for part, results in run.downstream.items():
        named = {row["grouping"]: row for row in results["groupings"]}
        name = (run.chosen or {}).get("name", next(iter(named), None))
        mine: Values = named.get(name, {})
        found += [(part, n.removesuffix("_lost"), mine[n]) for n in mine if n.endswith("_lost")]
    for part, metric, lost in found:
        text = HEADINGS.get(metric, metric.replace("auc_", "AUC, k = "))
        if value_of(lost) is not None and text != metric:
            rows.append(
                {
                    "part": part,
                    "metric": text,
                    **estimates({"difference": lost}, "difference"),
                    "distinguishable": distinguishable(lost),
                }
            )
    return build(
        "downstream_lost",
        "What the chosen grouping loses against one SAE per layer, by every measure (above 0: "
        "worse); held-out text: mean over the grouped layers",
        rows,
    )


def circuits_table(run: RunFiles) -> Table | None:
    """Return the circuits of every grouping, means over tasks."""
    rows = _of(run, "groupings")
    compared = ("ld_left", "ld_recovered", "faithfulness_none", "faithfulness_keep")
    pairs = [name for metric in compared for name in (metric, f"{metric}_lost")]
    others = ("completeness_none", "random_none", "single_layers")
    return build(
        "circuits",
        f"Circuits, means over {rows[0]['tasks'] if rows else 0} tasks: share of the logit "
        "difference (LD) that is left with all layers spliced, and recovered from that of the "
        "other prompt (with no preference left: a fifth to a half); areas of faithfulness without "
        "the SAEs' errors and with them (1 is the model), each with what is lost against one SAE "
        "per layer, paired; completeness, random: without errors; LD left with one layer spliced",
        [
            {
                "grouping": row["grouping"],
                "num_groups": row["num_groups"],
                **estimates(row, *pairs, *others),
            }
            for row in rows
        ],
        [i for i, row in enumerate(rows) if row["grouping"] == _shown(run)],
    )


def tasks_table(run: RunFiles) -> Table | None:
    """Return every task: how well the model does it, and the circuits of the first grouping."""
    rows = []
    for gate in _of(run, "gate"):
        row: dict[str, Any] = {
            "task": gate["task"],
            "accuracy": gate.get("accuracy") and min(gate["accuracy"], gate["accuracy_swapped"]),
            "task_metric": gate.get("metric") and min(gate["metric"], gate["metric_swapped"]),
        }
        reason = gate["reason"]
        for found in _of(run, "tasks"):
            if (found["task"], found["grouping"]) != (gate["task"], _shown(run)):
                continue
            reason = reason or found["reason"]
            errors = found["errors"]
            if errors == "none":
                row |= estimates({"ld_left": found.get("left")}, "ld_left")
            shown = {f"faithfulness_{errors}": found.get("faithfulness")}
            row |= estimates(shown, *shown)
        rows.append(row | {"reason": reason})
    return build(
        "circuit_tasks",
        f"Tasks: the model's lower accuracy and mean metric of both directions, and the circuits "
        f"of {_shown(run)}",
        rows,
    )


def circuit_latents_table(run: RunFiles, page: str) -> Table | None:
    """Return the latents with the largest effects; `page` is the address of the latents' page."""
    rows = []
    for gate in _of(run, "gate"):
        mine = [r for r in _of(run, "latents") if r["task"] == gate["task"]]
        for row in [r for r in mine if r["grouping"] == _shown(run)][:LATENTS]:
            link = f"{page}#{quote(row['sae'])}/{row['latent']}"
            shown = {key: row[key] for key in ("task", "sae", "latent", "effect")}
            linked = {"latent_link": link} if run.explained else {}
            rows.append({**shown, **linked, "layer": str(row["layer"])})
    return build(
        "circuit_latents",
        f"The latents of {_shown(run)} with the largest effects (below 0: supports the answer)",
        rows,
    )


def _of(run: RunFiles, table: str) -> Sequence[Values]:
    return run.downstream.get("circuits", {}).get(table, [])


def _shown(run: RunFiles) -> str:
    """Return the grouping whose circuits are shown: the chosen one, if they were measured."""
    names = [str(row["grouping"]) for row in _of(run, "groupings")]
    chosen = (run.chosen or {}).get("name")
    return chosen if chosen in names else next(iter(names), "")


def probes_table(run: RunFiles) -> Table | None:
    """Return how well k latents of each grouping tell concepts, next to the baselines.

    For many groupings the table has one k, in the middle; the csv has all.
    """
    found = run.downstream["probes"]
    few = len(found["groupings"]) <= 3
    shown = found["k"] if few else [found["k"][len(found["k"]) // 2]]
    rows = [
        {
            "grouping": row["grouping"],
            "num_groups": row["num_groups"],
            "k": k,
            **estimates({"auc": row[f"auc_{k}"]}, "auc"),
            **estimates({"auc_lost": row.get(f"auc_{k}_lost")}, "auc_lost"),
            "distinguishable": distinguishable(row.get(f"auc_{k}_lost")),
            **estimates({"auc_channels": row[f"auc_{k}_channels"]}, "auc_channels"),
            **estimates(row, "auc_residual"),
        }
        for row in found["groupings"]
        for k in shown
    ]
    return build(
        "probes",
        f"Probes on k latents: mean AUC over {plural(len(found['tasks']), 'concept')} and the "
        "grouped layers, lost against one SAE per layer; and the same on k channels, and on all, "
        "of the activations",
        rows,
    )


def benchmarks_table(run: RunFiles) -> Table | None:
    """Return how well the unchanged model does each task, and whether that is above chance."""
    rows = [
        {
            **{key: row[key] for key in ("task", "metric", "documents", "chance")},
            **estimates(row, "clean", "above_chance"),
            "interpreted": "yes" if row["interpreted"] else "no: not above chance",
        }
        for row in run.downstream["harness"]["tasks"]
    ]
    return build(
        "benchmarks",
        "The unchanged model on each task. Where it is not clearly better than chance, nothing is "
        "concluded about the SAEs",
        rows,
    )


def spliced_table(run: RunFiles) -> Table | None:
    """Return what each grouping's SAEs cost on the tasks that the unchanged model can do."""
    rows = [
        {
            **{key: row[key] for key in ("task", "metric", "grouping", "num_groups")},
            **estimates(row, "lost_together", "lost", "against_together"),
            "distinguishable": distinguishable(row.get("against_together")),
        }
        for row in run.downstream["harness"]["compared"]
    ]
    return build(
        "spliced",
        "What the SAEs of each grouping cost (positive is worse): all layers at once, the mean "
        "over layers spliced alone, and all at once minus one SAE per layer",
        rows,
    )


DOWNSTREAM_TABLES: dict[str, Sequence[Build]] = {  # by part
    "circuits": (circuits_table, tasks_table),
    "probes": (probes_table,),
    "harness": (benchmarks_table, spliced_table),
}
