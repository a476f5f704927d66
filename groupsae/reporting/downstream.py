"""The tables of the parts of an evaluation that say what the model can still do.

Each is built from `evaluation/<part>.json`, `RunFiles.downstream[<part>]`, for the screen and the
report's section "What the model can still do". Every column needs a heading in `tables.HEADINGS`.
"""

from collections.abc import Callable, Sequence

from groupsae.reporting.formatting import plural
from groupsae.reporting.load import RunFiles
from groupsae.reporting.tables import Table, build, distinguishable, estimates


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


Build = Callable[[RunFiles], Table | None]
DOWNSTREAM_TABLES: dict[str, Sequence[Build]] = {  # by part
    "probes": (probes_table,),
    "harness": (benchmarks_table, spliced_table),
}
