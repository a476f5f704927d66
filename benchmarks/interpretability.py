"""How well groups' latents are explained: `python -m benchmarks.interpretability <run> <run> ...`.

Interprets runs of `experiment=replication` (`make replicate` trains and evaluates them), one for
each seed, and writes the part between the two marks in docs/interpretation.md: explanations and
what they carry over, against the number of groups, next to the FVU lost. Runs that are interpreted
already are only read. `size=smallest` prints the tables of made-up figures, for CI.

Every difference has two intervals, both at 95 %:
- over seeds (Student's t, one value a seed);
- over latents and held-out documents (bootstrap, the mean over seeds of its half-widths).
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]

from benchmarks.replication import (
    Difference,
    against_layers,
    evaluation_of,
    summed_up,
    table,
    write_figures,
)
from benchmarks.timing import smallest
from groupsae.interpretation.files import Interpretation
from groupsae.interpretation.judge_scores import verdict
from groupsae.interpretation.judge_windows import DELPHI, POSITIVE, WindowChooser

DOC = Path(__file__).parent.parent / "docs" / "interpretation.md"
BEGIN = "<!-- figures: python -m benchmarks.interpretability -->"
LATENTS = 32  # of each SAE
GROUPINGS = f"[per_layer,{','.join(f'complete-{g}' for g in range(1, 11))}]"
OPTIONS = [
    f"interpretation.latents={LATENTS}",
    "interpretation.explain_tokens=24_576", "interpretation.score_tokens=24_576",
    "interpretation.top=4", "interpretation.sample=10", "interpretation.across=2", "logger=none",
]  # fmt: skip
NAMES = {
    "f1": "F1",
    "null_f1": "by another latent's rules",
    "shift_f1": "on firings moved to other documents",
    "direction_f1": "of random directions of like density",
    "lexicality": "area under precision against recall of a table of tokens",
}
KINDS = ("same", "narrows", "different", "unclear")


def interpreted(folder: Path, groupings: str = GROUPINGS) -> pd.DataFrame:
    """Return the table over groupings of a run; it is interpreted if it was not."""
    file = folder / "interpretation" / "groupings.csv"
    if not file.exists():
        command = [sys.executable, "-m", "groupsae.interpret", f"run={folder}", *OPTIONS]
        command.append(f"interpretation.groupings={groupings}")
        subprocess.run(command, check=True)
    return pd.read_csv(file)


def row_of(frame: pd.DataFrame, num_groups: int) -> pd.Series | None:
    """Return the row of complete linkage with so many groups."""
    mine = frame["rules"].fillna("").str.split(",").map(lambda rules: "complete" in rules)
    found = frame[mine & (frame["num_groups"] == num_groups) & (frame["kind"] == "groups")]
    return found.iloc[0] if len(found) else None


def estimated(rows: Sequence[pd.Series], metric: str) -> Difference:
    """Return a metric's mean over seeds, with its intervals."""
    ends = {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
    return summed_up([{end: row[name] for end, name in ends.items()} for row in rows])


def by_groups(frames: Sequence[pd.DataFrame], fvu_lost: Mapping[int, str]) -> list[str]:
    """Return what is lost at each number of groups, and what a latent's label carries over."""
    layers = int(frames[0].loc[frames[0]["kind"] == "per_layer", "num_groups"].iloc[0])
    quality, meaning = [], []
    for num_groups in range(1, layers):
        rows = [row for f in frames if (row := row_of(f, num_groups)) is not None]
        if len(rows) < len(frames):
            continue
        f1, label = (estimated(rows, f"{m}_difference") for m in ("f1", "one_label_f1"))
        worse = abs(f1.mean) > max(f1.seeds, f1.text)
        reading = ("worse" if f1.mean < 0 else "better") if worse else "not distinguishable"
        quality.append(
            [
                str(num_groups),
                fvu_lost.get(num_groups, "–"),
                f1.show(3),
                reading,
                label.show(3),
                estimated(rows, "lexicality_difference").show(3),
            ]
        )
        shares = [f"{np.mean([row[kind] for row in rows]):.0%}" for kind in KINDS]
        cells = [f"{np.mean([row[m] for row in rows]):.2f}" for m in ("labels", "tau_1")]
        meaning.append([str(num_groups), *cells, *shares])
    columns = ["G", "FVU lost", "F1 − per layer", "reading", "one label − per layer"]
    lines = table([*columns, "by token − per layer"], quality)
    return [*lines, *table(["G", "labels", "τ at 1", *KINDS], meaning)]


def lost_by_groups(evaluated: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Return the FVU lost at each number of groups of complete linkage, as evaluated."""
    counts = {row["num_groups"] for row in evaluated[0]["groupings"]}
    found = {count: against_layers(evaluated, "complete", count, "fvu") for count in counts}
    return {count: lost.show(4) for count, lost in found.items() if lost is not None}


def levels(frames: Sequence[pd.DataFrame]) -> str:
    """Return how well the latents of one SAE per layer are explained, and the nulls."""
    rows = [frame[frame["kind"] == "per_layer"].iloc[0] for frame in frames]
    means = (f"{text} {estimated(rows, name).mean:.3f}" for name, text in NAMES.items())
    explained, rare = int(rows[0]["explained"]), rows[0]["rare"]
    return (
        f"One SAE per layer, means over {len(frames)} seeds and the grouped layers: "
        f"{'; '.join(means)}. {explained} latents explained in each run ({rare:.0%} of those "
        "drawn fired too rarely)."
    )


def remembered(found: Interpretation, most: int = 400) -> str:
    """Return what explaining and scoring on one list gives to a judge that only remembers."""
    reached, overlaps = [], []
    for sae in found.saes.values():
        if len(sae.layers) > 1:
            continue
        chooser = WindowChooser(found, sae, DELPHI)
        for row in found.explanations[sae.name]["latents"]:
            shown = chooser.of(row["latent"])
            if not shown.enough or len(reached) == most:
                continue
            known = {window.peak for window in shown.explain}
            yes = [float(w.kind == POSITIVE and w.peak in known) for w in shown.score]
            scores = verdict(np.array(yes), shown.score, shown.rate)
            reached.append(scores["balanced_accuracy"])
            overlaps.append(shown.overlap)
    return (
        f"With delphi's windows, {np.mean(overlaps):.0%} of the positive windows to score on were "
        "also windows to explain. A judge that says yes to the windows that it remembers, and to "
        f"no other, has a balanced accuracy of {np.mean(reached):.3f} there ({len(reached)} "
        "latents of one SAE per layer); 0.500 is what it knows about the latents."
    )


def made_up(seed: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a table over groupings and an evaluation of drawn figures."""
    draws, counts = np.random.default_rng(seed), (1, 2, 3)
    metrics = (*NAMES, "f1_difference", "one_label_f1_difference", "lexicality_difference")
    rows = [
        {
            "rules": "complete",
            "kind": "groups" if count < max(counts) else "per_layer",
            "num_groups": count,
            "explained": 9,
            "rare": 0.1,
            **{f"{m}{end}": draws.random() for m in metrics for end in ("", "_low", "_high")},
            **{m: draws.random() for m in (*KINDS, "labels", "tau_1")},
        }
        for count in counts
    ]
    lost = {"fvu": {"value": 0.1, "low": 0.0, "high": 0.2}}
    groups = [{**row, "rules": ["complete"], "against_per_layer": lost} for row in rows]
    return pd.DataFrame(rows), {"groupings": groups}


def main(arguments: Sequence[str]) -> None:
    """Write the tables."""
    if smallest():
        frames, evaluated = zip(*map(made_up, range(2)), strict=True)
        print("\n".join([levels(frames), *by_groups(frames, lost_by_groups(evaluated))]))
        return
    folders = [Path(argument) for argument in arguments]
    if not folders:
        sys.exit("which runs? python -m benchmarks.interpretability <run folder> ...")
    evaluated = [evaluation_of(folder) for folder in folders]
    frames = [interpreted(folder) for folder in folders]
    found = Interpretation(folders[0] / "interpretation")
    explain, score = found.num_tokens
    lines = [
        f"{len(folders)} seeds; rules for {LATENTS} latents of each SAE, made on {explain:,} "
        f"tokens, scored on {score:,} held-out ones ({len(np.unique(found.documents[explain:]))} "
        "documents); complete linkage; value ± interval over seeds (± over latents, documents).",
        "",
        levels(frames),
        "",
        *by_groups(frames, lost_by_groups(evaluated)),
        remembered(found),
        "",
    ]
    write_figures(DOC, BEGIN, lines)


if __name__ == "__main__":
    main(sys.argv[1:])
