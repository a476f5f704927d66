"""The tables of docs/downstream.md: `python -m benchmarks.downstream <run folder> ...`.

The runs are of `groups=all` on one model with different seeds, and were evaluated. Circuits are
measured where a run has none yet (a few minutes each, one core). The tables go between the two
marks in docs/downstream.md. `size=smallest` trains a small run itself, for CI, and only prints.

Intervals at 95 %: over seeds (Student's t), and in brackets over held-out text or the pairs of the
tasks (bootstrap, paired, the mean over seeds of its half-widths).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replication import over_seeds, summed_up, table, write_figures
from benchmarks.timing import SMALLEST_RUN, smallest

DOC = Path(__file__).parent.parent / "docs" / "downstream.md"
BEGIN = "<!-- figures: python -m benchmarks.downstream -->"
COUNTS = (1, 2, 3, 4, 6)  # of groups
CIRCUITS = [
    "evaluation=circuits", "evaluation.circuits.train_pairs=24",
    "evaluation.circuits.test_pairs=24", "evaluation.circuits.fractions=[0.01,0.03,0.1,0.3]",
    "evaluation.circuits.curves=[faithfulness]", "evaluation.circuits.single_layers=false",
    "logger=none", "device=cpu",
]  # fmt: skip
SMALL = [  # a run, trained and evaluated in one command
    "groups=all", "groups.rules=[complete]", "groups.smaller=[]", "evaluate=true",
    "evaluation=[heldout,circuits]", "evaluation.similarity_tokens=0",
    "evaluation.circuits.groupings=[complete-1,per_layer]",
    "evaluation.circuits.tasks=[quote]", "evaluation.circuits.train_pairs=2",
    "evaluation.circuits.test_pairs=2", "evaluation.circuits.fractions=[0.1,1]",
    "evaluation.circuits.single_layers=false", "evaluation.circuits.bootstrap.resamples=10",
]  # fmt: skip
METRICS = {  # of circuits
    "ld_left": "LD left",
    "ld_recovered": "LD recovered",
    "faithfulness_none": "faithfulness, no errors",
    "faithfulness_keep": "faithfulness, errors kept",
}
Rows = dict[str, dict[str, Any]]  # by grouping


def measured(folder: Path) -> tuple[Rows, Rows]:
    """Return the groupings of a run as the held-out text and as circuits have them."""
    heldout = json.loads((folder / "evaluation" / "evaluation.json").read_text())["groupings"]
    file = folder / "evaluation" / "circuits.json"
    if not file.exists():
        ours = [g for g in heldout if "complete" in g["rules"] and g["num_groups"] in COUNTS]
        named = f"evaluation.circuits.groupings=[{','.join(g['name'] for g in ours)},per_layer]"
        command = [sys.executable, "-m", "groupsae.evaluate", f"run={folder}", named]
        subprocess.run([*command, *CIRCUITS], check=True)
    circuits = json.loads(file.read_text())["groupings"]
    return {g["name"]: g for g in heldout}, {g["grouping"]: g for g in circuits}


def report(runs: Sequence[tuple[Rows, Rows]]) -> list[str]:
    """Return all tables, line by line."""
    names = [name for name, row in runs[0][1].items() if row["kind"] == "groups"]
    names.sort(key=lambda name: runs[0][1][name]["num_groups"])
    chosen = next(iter(runs[0][0]))
    lines = [
        f"{len(runs)} seeds; circuits on {runs[0][1]['per_layer']['tasks']} tasks. One SAE per "
        f"layer: FVU {_mean(runs, 0, 'fvu'):.3f}, "
        + ", ".join(f"{text} {_mean(runs, 1, key):.3f}" for key, text in METRICS.items())
        + f". Chosen by AMAD: {chosen}.",
        "",
        "### Lost against one SAE per layer",
        "",
    ]
    columns, rows = ["G", "FVU", *METRICS.values()], []
    for name in names:
        cells = [
            summed_up([heldout[name]["against_per_layer"]["fvu"] for heldout, _ in runs]).show(4)
        ]
        for metric in METRICS:
            if all(f"{metric}_lost" in circuits[name] for _, circuits in runs):
                gap = summed_up([circuits[name][f"{metric}_lost"] for _, circuits in runs])
                apart = abs(gap.mean) > np.nanmax([gap.seeds, gap.text])
                cells.append(gap.show(3) + ("" if apart else ", not distinguishable"))
            else:
                cells.append("–")
        rows.append(
            [f"**{_count(runs, name)}**" if name == chosen else _count(runs, name), *cells]
        )
    lines += table(columns, rows)
    lines += ["### The same as a share of the figure of one SAE per layer, %", ""]
    rows = []
    for name in names:
        shares = {
            "fvu": [
                _value(h[name]["against_per_layer"]["fvu"])
                / _value(h["per_layer"]["grouped_layers"]["fvu"])
                for h, _ in runs
            ]
        }
        for metric in METRICS:
            shares[metric] = [
                _value(c[name].get(f"{metric}_lost")) / _value(c["per_layer"].get(metric))
                for _, c in runs
            ]
        cells = [
            "{:+.1f} ± {:.1f}".format(*over_seeds(100 * np.array(x))) for x in shares.values()
        ]
        rows.append(
            [f"**{_count(runs, name)}**" if name == chosen else _count(runs, name), *cells]
        )
    return [*lines, *table(columns, rows)]


def _count(runs: Sequence[tuple[Rows, Rows]], name: str) -> str:
    return str(runs[0][1][name]["num_groups"])


def _value(stored: Any) -> float:
    return float("nan") if stored is None else float(stored["value"])


def _mean(runs: Sequence[tuple[Rows, Rows]], part: int, metric: str) -> float:
    rows = [run[part]["per_layer"] for run in runs]
    return float(
        np.mean([_value((r["grouped_layers"] if part == 0 else r).get(metric)) for r in rows])
    )


def main(arguments: Sequence[str]) -> None:
    """Write the tables."""
    if smallest():
        with tempfile.TemporaryDirectory() as output:
            given = [*SMALL, f"output={output}", *SMALLEST_RUN]
            subprocess.run([sys.executable, "-m", "groupsae.train", *given], check=True)
            (folder,) = Path(output).glob("tiny/*/*")
            print("\n".join(report([measured(folder)])))
        return
    folders = [Path(each) for each in arguments]
    if not folders:
        sys.exit("which runs? python -m benchmarks.downstream <run folder> <run folder> ...")
    write_figures(DOC, BEGIN, report([measured(folder) for folder in folders]))


if __name__ == "__main__":
    main(sys.argv[1:])
