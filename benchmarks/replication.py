"""The tables of docs/replication.md: `python -m benchmarks.replication seed=0,1,2`.

Reads the evaluated runs of `experiment=replication` and writes the part between the two marks in
docs/replication.md, and docs/replication.png. `make replicate` trains the runs first; other
options that they were trained with are given here too. `size=smallest` trains and evaluates a
small run itself, for CI, and only prints.

Every difference has two intervals, both at 95 %, since they answer two questions:
- over seeds (Student's t, one value a seed): would other initial weights and another order of the
  text give the same?
- over documents (bootstrap, the mean over seeds of its half-widths): would other held-out text?
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra import compose, initialize_config_dir
from scipy import stats

from benchmarks.timing import SMALLEST_RUN, smallest
from groupsae.app.run_folder import register_resolver, run_folder
from groupsae.config.instantiate import CONF
from groupsae.reporting.style import COLOURS, new_axes

DOC = Path(__file__).parent.parent / "docs" / "replication.md"
BEGIN, END = "<!-- figures: python -m benchmarks.replication -->", "<!-- end of figures -->"
RULES = ("complete", "minmax", "published", "even")
METRICS = {"fvu": ("FVU", 4), "delta_ce_percent": ("ΔCE, %", 2)}
Evaluation = dict[str, Any]


class Difference(NamedTuple):
    """A mean over seeds with the half-widths of its two intervals."""

    mean: float
    seeds: float
    text: float

    def show(self, digits: int) -> str:
        """Return `mean ± seeds (± text)`."""
        return f"{self.mean:+.{digits}f} ± {self.seeds:.{digits}f} (± {self.text:.{digits}f})"


def summed_up(intervals: Sequence[dict[str, float]]) -> Difference:
    """Return mean, t-interval and mean bootstrap half-width of one figure over seeds."""
    values = np.array([each["value"] for each in intervals])
    text = float(np.mean([(each["high"] - each["low"]) / 2 for each in intervals]))
    return Difference(*over_seeds(values), text)


def over_seeds(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % t-interval; nan for one seed."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def evaluations(seeds: Sequence[str], overrides: Sequence[str]) -> list[Evaluation]:
    """Return the evaluations of the replication's runs."""
    runs = [folder_of(["experiment=replication", f"seed={seed}", *overrides]) for seed in seeds]
    return [evaluation_of(run) for run in runs]


def evaluation_of(run: Path) -> Evaluation:
    """Return the evaluation of a run."""
    file = run / "evaluation" / "evaluation.json"
    if not file.exists():
        sys.exit(f"{file} is not there: run `make replicate`, which trains and evaluates")
    found: Evaluation = json.loads(file.read_text())
    return found


def folder_of(overrides: Sequence[str]) -> Path:
    """Return the run folder of a training with these overrides."""
    register_resolver()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return run_folder(compose("train", list(overrides)))


def write_figures(doc: Path, begin: str, lines: Sequence[str]) -> None:
    """Print lines, and write them between the two marks of a page."""
    head, rest = doc.read_text().split(begin)
    doc.write_text(f"{head}{begin}\n\n" + "\n".join(lines) + f"\n{END}{rest.split(END, 1)[1]}")
    print("\n".join(lines))


def grouping(evaluation: Evaluation, rule: str, num_groups: int) -> dict[str, Any] | None:
    """Return a rule's grouping, smaller SAEs for the rule `smaller`."""
    for each in evaluation["groupings"]:
        mine = each["kind"] == "smaller" if rule == "smaller" else rule in each["rules"]
        if mine and each["num_groups"] == num_groups:
            return dict(each)
    return None


def against_layers(
    runs: Sequence[Evaluation], rule: str, num_groups: int, metric: str
) -> Difference | None:
    """Return what a grouping loses against one SAE per layer."""
    found = [grouping(run, rule, num_groups) for run in runs]
    if any(each is None or each["against_per_layer"] is None for each in found):
        return None
    return summed_up([each["against_per_layer"][metric] for each in found if each])


def compared(
    runs: Sequence[Evaluation], rule: str, baseline: str, num_groups: int, metric: str
) -> Difference | None:
    """Return a rule's grouping minus a baseline's of equal G; None where they are the same."""
    rows = []
    for run in runs:
        mine, other = (grouping(run, name, num_groups) for name in (rule, baseline))
        if mine is None or other is None or mine["name"] == other["name"]:
            return None
        names = {"grouping": mine["name"], "baseline": other["name"]}
        rows += [r for r in run["comparisons"] if names.items() <= r.items()]
    return summed_up([row[metric] for row in rows])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def loss_table(runs: Sequence[Evaluation], metric: str) -> list[str]:
    """Return what every grouping loses against one SAE per layer, by G and rule."""
    digits = METRICS[metric][1]
    kinds = (*RULES, "smaller")
    rows = []
    for num_groups in range(1, _grouped(runs[0])):
        shown = [against_layers(runs, kind, num_groups, metric) for kind in kinds]
        chosen = grouping(runs[0], "complete", num_groups)
        assert chosen is not None
        marked = f"**{num_groups}**" if "complete" in chosen["chosen_by"] else str(num_groups)
        cells = ["–" if each is None else each.show(digits) for each in shown]
        rows.append([marked, f"{chosen['amad']:.3f}", f"{chosen['cost']['paper']:.2f}", *cells])
    return table(["G", "AMAD", "cost", *kinds], rows)


def rival_table(runs: Sequence[Evaluation], baseline: str) -> list[str]:
    """Return AMAD's groups (complete linkage) minus a baseline of equal cost, by G."""
    rows = []
    for num_groups in range(1, _grouped(runs[0])):
        cells = []
        for metric, (_, digits) in METRICS.items():
            gap = compared(runs, "complete", baseline, num_groups, metric)
            cells += ["–", "–"] if gap is None else [gap.show(digits), _verdict(gap)]
        if set(cells) != {"–"}:
            rows.append([str(num_groups), *cells])
    return table(["G", "FVU", "reading", "ΔCE, %", "reading"], rows)


def _verdict(gap: Difference) -> str:
    """Return who is better if both intervals leave out 0."""
    if abs(gap.mean) <= max(gap.seeds, gap.text):
        return "not distinguishable"
    return "groups better" if gap.mean < 0 else "groups worse"


def _grouped(run: Evaluation) -> int:
    return max(g["num_groups"] for g in run["groupings"] if g["kind"] == "per_layer")


def absolute_table(runs: Sequence[Evaluation]) -> list[str]:
    """Return the absolute figures of the groupings that matter, means over seeds."""
    rows = []
    for each in runs[0]["groupings"]:
        keep = each["kind"] != "groups" or each["chosen_by"]
        if not keep:
            continue
        mine = [next(g for g in run["groupings"] if g["name"] == each["name"]) for run in runs]
        figures = [np.mean([g["grouped_layers"][m]["value"] for g in mine]) for m in METRICS]
        score = np.mean([g["grouped_layers"]["ce_score"]["value"] for g in mine])
        label = each["name"] + (f" ({', '.join(each['rules'])})" if each["rules"] else "")
        rows.append([label, f"{figures[0]:.4f}", f"{figures[1]:.2f}", f"{score:.4f}"])
    return table(["SAEs", "FVU", "ΔCE, %", "CE score"], rows)


def choice_table(runs: Sequence[Evaluation]) -> list[str]:
    """Return how far each number of groups closes the gap between one group and one per layer.

    The knee is the G that lies furthest below the straight line from G = 1 to one SAE per layer.
    """
    layers = _grouped(runs[0])
    counts = list(range(1, layers + 1))
    rows, knees = [], dict[str, list[int]]()
    closed: dict[str, np.ndarray] = {}
    for metric in METRICS:
        lost = np.array([[_lost(run, "complete", g, metric) for g in counts] for run in runs])
        chord = lost[:, :1] + (lost[:, -1:] - lost[:, :1]) * np.linspace(0, 1, layers)
        knees[metric] = [counts[i] for i in (chord - lost).argmax(1)]
        closed[metric] = 100 * (1 - lost / lost[:, :1])
    for i, count in enumerate(counts[:-1]):
        found = grouping(runs[0], "complete", count)
        assert found is not None
        cells = []
        for metric in METRICS:
            mean, half = over_seeds(closed[metric][:, i])
            cells.append(f"{mean:.0f} ± {half:.0f} %")
        marked = f"**{count}**" if "complete" in found["chosen_by"] else str(count)
        rows.append([marked, f"{found['amad']:.3f}", *cells])
    names = {metric: name.split(",")[0] for metric, (name, _) in METRICS.items()}
    lines = table(["G", "AMAD", *(f"{name} gap closed" for name in names.values())], rows)
    found_knees = (f"{name}: {knees[metric]}" for metric, name in names.items())
    return [*lines, f"G at the knee of the curve, seed by seed: {'; '.join(found_knees)}.", ""]


def halving_table(runs: Sequence[Evaluation]) -> list[str]:
    """Return the loss from halving the SAEs' budget, between measured G linear in log G."""
    layers = _grouped(runs[0])
    kinds = ("complete", "even", "smaller")
    rows = []
    for halvings in (1, 2, 3):
        cells = []
        for metric, (_, digits) in METRICS.items():
            for kind in kinds:
                values = np.array(
                    [_between(run, kind, layers / 2**halvings, metric) for run in runs]
                )
                mean, half = over_seeds(values)
                cells.append(f"{mean:+.{digits}f} ± {half:.{digits}f}")
        rows.append([f"1/{2**halvings}", *cells])
    columns = [f"{name}, {kind}" for name, _ in METRICS.values() for kind in kinds]
    return table(["SAE budget", *columns], rows)


def _between(run: Evaluation, kind: str, num_groups: float, metric: str) -> float:
    layers = _grouped(run)
    counts = [g for g in range(1, layers) if grouping(run, kind, g) is not None] + [layers]
    lost = [_lost(run, kind, g, metric) for g in counts]
    return float(np.interp(np.log2(num_groups), np.log2(counts), lost))


def _lost(run: Evaluation, kind: str, num_groups: int, metric: str) -> float:
    """Return what a grouping loses against one SAE per layer; nothing for one SAE per layer."""
    found = grouping(run, kind, num_groups)
    if num_groups == _grouped(run) or found is None:
        return 0.0
    return float(found["against_per_layer"][metric]["value"])


def draw(runs: Sequence[Evaluation], path: Path) -> None:
    """Draw the loss in FVU against G, with the intervals over seeds."""
    figure, axes = new_axes(7.0, 4.2)
    counts = range(1, _grouped(runs[0]))
    look: dict[str, Callable[[int], float]] = {}
    for i, kind in enumerate((*RULES, "smaller")):
        look[kind] = lambda g, i=i: g + 0.06 * (i - 2)  # type: ignore[misc]
        points = [(g, against_layers(runs, kind, g, "fvu")) for g in counts]
        shown = [(look[kind](g), gap) for g, gap in points if gap is not None]
        axes.errorbar(
            [x for x, _ in shown],
            [gap.mean for _, gap in shown],
            yerr=[gap.seeds for _, gap in shown],
            color=COLOURS[i],
            marker="s" if kind == "smaller" else "o",
            ls="none" if kind == "smaller" else "-",
            ms=4,
            lw=1,
            capsize=2,
            label="smaller SAEs" if kind == "smaller" else kind,
        )
    axes.axhline(0, color="0.4", lw=1)
    axes.set(
        xlabel="number of groups G",
        ylabel="FVU lost against one SAE per layer",
        title=f"Bundled model, {len(runs)} seeds, 95 % intervals over seeds",
        xticks=list(counts),
    )
    axes.legend(frameon=False)
    figure.savefig(path)


def main(arguments: Sequence[str]) -> None:
    """Write figures and tables."""
    if smallest():
        with tempfile.TemporaryDirectory() as output:
            given = [
                "experiment=replication", f"output={output}", "groups.rules=[complete,even]",
                "groups.smaller=[2]", *SMALLEST_RUN,
            ]  # fmt: skip
            subprocess.run([sys.executable, "-m", "groupsae.train", "seed=0", *given], check=True)
            runs = 2 * evaluations(["0"], given)  # as if a second seed gave the same
            draw(runs, Path(output) / "replication.png")
        print("\n".join(report(runs)))
        return
    asked = [a.removeprefix("seed=") for a in arguments if a.startswith("seed=")]
    if len(asked) != 1:
        sys.exit("which seeds? python -m benchmarks.replication seed=0,1,2")
    rest = [a for a in arguments if not a.startswith("seed=")]
    runs = evaluations(asked[0].split(","), rest)
    lines = report(runs)
    draw(runs, DOC.with_suffix(".png"))
    write_figures(DOC, BEGIN, lines)


def report(runs: Sequence[Evaluation]) -> list[str]:
    """Return all tables, line by line."""
    first = runs[0]
    lines = [
        f"{len(runs)} seeds; {first['saes'][0]['tokens']:,} tokens per SAE; {len(first['saes'])} "
        f"SAEs a seed from one stream; evaluated on {first['tokens']:,} held-out tokens "
        f"({first['sequences']} sequences from {first['documents']} documents); clean CE "
        f"{first['ce']['value']:.3f} nats.",
        "",
        "### Levels: mean over the 11 grouped layers and the seeds",
        "",
        *absolute_table(runs),
    ]
    for metric, (name, _) in METRICS.items():
        lines += [f"### {name} lost against one SAE per layer", "", *loss_table(runs, metric)]
    for baseline, name in (("even", "evenly spaced groups"), ("smaller", "smaller SAEs")):
        lines += [
            f"### Complete linkage minus {name}, equal G (negative: complete linkage is better)",
            "",
            *rival_table(runs, baseline),
        ]
    return [
        *lines,
        "### Does AMAD at theta 0.2 pick a good G: complete linkage, the gap from one group to "
        "one SAE per layer",
        "",
        *choice_table(runs),
        "### What is lost when the budget of the SAEs on the grouped layers is halved",
        "",
        *halving_table(runs),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
