"""What sharing costs the latents: `python -m benchmarks.probing run=<folder>[,<folder>...]`.

Probes on the SAEs of runs of all groupings (`groups=all`) with one seed each: one SAE per layer,
and the groupings of G=1, 2 and 4 by the rule `complete`, with the FVU of their evaluations next to
them. With `harness=true` the first run does the tasks code and arithmetic of lm-eval, too
(`pip install 'groupsae[downstream]'`). Writes the parts between the marks in docs/probes.md where
there are three runs. `size=smallest` trains a run for a few steps.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.replication import summed_up, table, write_figures
from benchmarks.timing import SMALLEST_RUN, options, smallest
from groupsae import train
from groupsae.app.evaluate import trained_run
from groupsae.app.run_folder import finished_run, register_resolver
from groupsae.evaluation.harness import Harness
from groupsae.evaluation.parts import Run
from groupsae.evaluation.probes import Probes
from groupsae.files.reading import read_json
from groupsae.runtime.quiet import quiet

COUNTS = (1, 2, 4)
GROUPINGS = ("per_layer", *(f"complete-{count}" for count in COUNTS))
KS = (1, 5)  # latents of a probe
BOOTSTRAP = {"resamples": 1000, "level": 0.95, "seed": 0}
DOC = Path(__file__).parent.parent / "docs" / "probes.md"
BEGIN = "<!-- figures: python -m benchmarks.probing -->"


def restricted(folder: Path, names: Sequence[str] = GROUPINGS) -> Run:
    """Return a run with the groupings of these names only."""
    run = trained_run(folder, finished_run(folder, trusted=False), torch.device("cpu"))
    groupings = [each for name in names for each in run.groupings if each.name == name]
    served = {name for each in groupings for name in each.sae_of_layer.values()}
    saes = {name: suite for name, suite in run.saes.items() if name in served}
    return replace(run, groupings=groupings, saes=saes)


def probed(run: Run, labels: Sequence[str], examples: int = 500) -> dict[str, Any]:
    """Return the probes' means of each grouping."""
    part = Probes(labels=labels, k=KS, examples=examples, seed=0, bootstrap=BOOTSTRAP)
    return {row["grouping"]: row for row in part.measure(run)["groupings"]}


def fvu_lost(runs: Sequence[Run]) -> dict[str, str]:
    """Return the FVU that each grouping loses, as the runs were evaluated."""
    lost: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        evaluated = read_json(run.folder / "evaluation" / "evaluation.json") or {}
        for row in evaluated.get("groupings", []):
            if row["against_per_layer"]:
                lost.setdefault(row["name"], []).append(row["against_per_layer"]["fvu"])
    return {name: summed_up(rows).show(4) for name, rows in lost.items()}


def probe_table(found: Sequence[Mapping[str, Any]], lost: Mapping[str, str]) -> list[str]:
    """Return the table of the probes of runs that differ in their seed."""
    columns = ["grouping", "G", "FVU lost"]
    for k in KS:
        columns += [f"AUC, k = {k}", "lost", f"{k} channels"]
    lines = []
    for name, first in found[0].items():
        rows = [each[name] for each in found]
        cells = [name, str(first["num_groups"]), lost.get(name, "")]
        for k in KS:
            key = f"auc_{k}_lost"
            cells.append(_mean(rows, f"auc_{k}"))
            cells.append(summed_up([row[key] for row in rows]).show(3) if key in first else "")
            cells.append(_mean(rows, f"auc_{k}_channels"))
        lines.append([*cells, _mean(rows, "auc_residual")])
    return table([*columns, "all channels"], lines)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{np.mean([row[key]['value'] for row in rows]):.3f}"


def harnessed(run: Run, limit: int) -> list[str]:
    """Return the table of the tasks of lm-eval, for two groups of layers."""
    few = [each for each in run.groupings if each.num_groups == COUNTS[1]]
    per_layer = [each for each in run.groupings if each.kind == "per_layer"]
    run = replace(run, groupings=[*few, *per_layer])
    part = Harness(
        tasks=["code", "arithmetic"], folder=None, limit=limit, num_fewshot=None, batch_size=16,
        layers=False, seed=0, bootstrap=BOOTSTRAP,
    )  # fmt: skip
    part.check(run.data)
    found = part.measure(run)
    heading = "| task | metric | unchanged | chance | better by | lost, all layers at once | "
    lines = [heading + "minus one SAE per layer |", "|" + "---|" * 7]
    for task in found["tasks"]:
        cells = [task["task"], task["metric"], _interval(task["clean"]), f"{task['chance']:.2f}"]
        cells.append(_interval(task["above_chance"]))
        spliced = [
            row for row in found["compared"]
            if (row["task"], row["metric"], row["grouping"])
            == (task["task"], task["metric"], few[0].name)
        ]  # fmt: skip
        figures = ("lost_together", "against_together")
        cells += [_interval(row[name]) for row in spliced for name in figures]
        cells += [] if spliced else ["not above chance: not interpreted", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _interval(values: Mapping[str, float]) -> str:
    return f"{values['value']:.2f} ({values['low']:.2f} to {values['high']:.2f})"


def main(arguments: Sequence[str]) -> None:
    """Print the tables, and write them."""
    quiet()
    register_resolver()
    given = options(arguments, run=("", ".+"), harness=("false", "true|false"))
    with tempfile.TemporaryDirectory() as temporary:
        folders, labels = [Path(each) for each in given["run"].split(",") if each], "python"
        if smallest():
            made = [
                f"output={temporary}", "groups=all", "groups.rules=[complete]",
                "groups.smaller=[]", "logger=none",
            ]  # fmt: skip
            folders, labels = [train([*SMALLEST_RUN, *made]).folder], f"{temporary}/labels.csv"
            rows = [f"def f{n}(,name\nx = {n},number\n" for n in range(20)]
            Path(labels).write_text("text,label\n" + "".join(rows))
        runs = [restricted(folder) for folder in folders]
        lines = probe_table([probed(run, [labels]) for run in runs], fvu_lost(runs))
        if given["harness"] == "true":
            lines += ["", *harnessed(runs[0], 5 if smallest() else 60)]
    if len(runs) > 2 and given["harness"] == "true":
        write_figures(DOC, BEGIN, [*lines, ""])
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
