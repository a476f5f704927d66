"""The tables of docs/better-groups.md: `python -m benchmarks.better_groups seed=0,1,2`.

Trains, in child processes of `python -m groupsae.train`, one SAE per layer, the paper's group
SAEs, layer-aware ones, and layer-aware ones on several rows of each token; then compares them at
equal tokens of the language model (which are equal steps here), and at equal FLOPs of the complete
training, the language model's included. Runs at equal tokens are also interpreted and probed.
Finished runs are reused, so it can be stopped and given again; activations of a seed are computed
once and kept in outputs/store (6 KB a token, float32). Writes the part between two marks in
docs/better-groups.md.

Options: `tokens=` for each SAE, `jobs=` runs at a time, `rates=` of learning, `rows=` of each
token where there are several, and any override of the training. `all=<folder>,<folder>,...` names
finished runs of all groupings, one for each seed (`experiment=replication groups.smaller=[]
stream.blocks_per_step=2`): one SAE per layer and the paper's groups are read from them, and only
equal tokens are compared. `looks=false` interprets and probes nothing. `size=smallest` is for CI:
some SAEs, one seed, one step, in this process, and it only prints.

Fair to all: the same text, steps, seeds and start of the decoder biases. The learning rate is the
best of `rates=` on the first seed, for one SAE per layer, the paper's group SAEs and those with
maps, whose rate the other layer-aware ones take. Intervals are Student's t over seeds, 95 %;
differences are paired by seed.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]

import groupsae
from benchmarks.interpretability import OPTIONS
from benchmarks.replication import folder_of, over_seeds, table, write_figures
from benchmarks.timing import SMALLEST_RUN, smallest, without_size
from groupsae.evaluation.similarity import mmcs
from groupsae.files.reading import read_json
from groupsae.grouping.groupings import groupings
from groupsae.runtime.quiet import quiet
from groupsae.suite.groups_file import load_plan
from groupsae.suite.suite import load_suite

DOC = Path(__file__).parent.parent / "docs" / "better-groups.md"
BEGIN = "<!-- figures: python -m benchmarks.better_groups -->"
BEGIN_ALL = "<!-- figures: python -m benchmarks.better_groups all= -->"
RANK = 8  # of the maps
LAYERS, GROUP, STARTED, BIASES, MAPS = (
    "one SAE per layer", "group (the paper's)", "group, b_dec from the mean", "group, own biases",
    f"group, own biases, rank {RANK}",
)  # fmt: skip
OWN = ["groups=amad", "sae.layer_bias=per_layer"]
ARMS = {
    LAYERS: ["groups=per_layer"],
    GROUP: ["groups=amad"],
    STARTED: ["groups=amad", "b_dec_start=mean"],  # where own biases start
    BIASES: OWN,
    MAPS: [*OWN, f"sae.layer_rank={RANK}"],
}
STUDY = [  # of every run; the training is that of experiment=replication
    "stream.blocks_per_step=2", "calibration.centring=none", "b_dec_start=zero",
    "eval_every=500", "checkpoint_every=500", "+trainer.enable_progress_bar=false",
    "data.cache=outputs/store", "data.cache_dtype=float32", "evaluation.tokens=32_768",
]  # fmt: skip
SPEED, FIXED = 7_000, 40  # tokens a second, and seconds of start and evaluation, on two AVX2 cores
EVALUATION = Path("evaluation") / "evaluation.json"
LOOKS = {  # into runs at equal tokens: the file each leaves -> its command
    Path("interpretation") / "groupings.csv": ["groupsae.interpret", *OPTIONS],
    Path("evaluation") / "probes.json": [
        "groupsae.evaluate", "evaluation=probes", "evaluation.probes.k=[1]", "logger=none",
    ],
}  # fmt: skip
Rates = Mapping[str, str]


class Study(NamedTuple):
    """What is trained."""

    seeds: list[str]
    tokens: int
    jobs: int
    rates: Sequence[str]
    given: list[str]  # overrides of every run
    arms: Mapping[str, Sequence[str]]  # name -> overrides
    all: Sequence[Path] = ()  # runs of all groupings, seed by seed
    looks: bool = False

    def command(self, arm: str, seed: str, rate: str, tokens: int) -> list[str]:
        """Return the overrides of one run."""
        own = [f"seed={seed}", f"optim.base_lr={rate}", f"tokens={tokens}"]
        return [*STUDY, *self.given, *self.arms[arm], *own]

    def folders(self, arm: str, commands: Sequence[Sequence[str]]) -> list[Path]:
        """Return the run of an arm for each seed."""
        return list(self.all) if self.reads(arm) else [folder_of(each) for each in commands]

    def reads(self, arm: str) -> bool:
        """Return whether the runs of all groupings have an arm."""
        return bool(self.all) and arm in (LAYERS, GROUP)


class Figures(NamedTuple):
    """Of one run; means are over the layers that are grouped: all but the last."""

    tokens: int
    steps: int
    flops: int  # of the training, with the language model and the measuring of the layers
    fixed_flops: int  # the part of it that does not depend on the tokens
    sae_flops: int
    fvu: float
    delta_ce: float  # nats; nan without an evaluation
    dead: float  # share of the latents, by the counters of training
    mmcs: float  # of the decoders of neighbouring layers that share a group of AMAD's
    f1: float  # of rules for latents; nan where not interpreted
    auc: float  # of probes on one latent; nan where not probed


def train(commands: Sequence[Sequence[str]], jobs: int, *, evaluate: bool) -> None:
    """Run the commands that have no result yet, several at a time; print what that will take."""
    evaluate = evaluate and not smallest()
    ending = EVALUATION if evaluate else Path("summary.json")
    missing = [each for each in commands if not (folder_of(each) / ending).exists()]
    tokens = [int(dict(a.split("=", 1) for a in each)["tokens"]) for each in missing]
    seconds = sum(tokens) / SPEED + FIXED * len(missing)
    print(
        f"{len(missing)} of {len(commands)} runs to train, {sum(tokens):,} tokens in all: about "
        f"{seconds / 60:.0f} minutes on two free cores",
        flush=True,
    )
    more = f"evaluate={str(evaluate).lower()}"
    if smallest():  # a process for each would take too long for CI
        for each in missing:
            groupsae.train([more, *each])
        return
    run_all([["groupsae.train", more, *each] for each in missing], jobs)


def run_all(modules: Sequence[Sequence[str]], jobs: int) -> None:
    """Run `python -m` with these arguments, several at a time; count those that ended."""
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    with ThreadPoolExecutor(jobs) as pool:
        commands = ([sys.executable, "-m", *each] for each in modules)
        for number, _ in enumerate(pool.map(run, commands), 1):
            print(f"{number} of {len(modules)}", flush=True)


def look_into(folders: Sequence[Path], jobs: int) -> None:
    """Interpret and probe finished runs, where that has not been done."""
    missing = [
        (module, f"run={folder}", *options)
        for folder in dict.fromkeys(folders)
        for file, (module, *options) in LOOKS.items()
        if not (folder / file).exists()
    ]
    print(f"{len(missing)} interpretations and probes to make", flush=True)
    run_all(missing, jobs)


def looked(folder: Path, grouping: str) -> tuple[float, float]:
    """Return F1 of rules and AUC of probes of a grouping; nan for what its run does not have."""
    explained, probes = (folder / file for file in LOOKS)
    f1 = auc = float("nan")
    if explained.exists():
        f1 = float(pd.read_csv(explained).set_index("grouping").loc[grouping, "f1"])
    if found := read_json(probes):
        (row,) = (each for each in found["groupings"] if each["grouping"] == grouping)
        auc = row["auc_1"]["value"]
    return f1, auc


def summary_of(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished run."""
    return dict(json.loads((folder / "summary.json").read_text()))


def figures(folder: Path, arm: str, pairs: Sequence[tuple[int, int]]) -> Figures:
    """Return the figures of an arm in a finished run; MMCS compares the `pairs` of layers."""
    plan = load_plan(folder)
    assert plan is not None
    found = groupings(plan)
    grouping = found[0] if arm != LAYERS else next(g for g in found if g.kind == "per_layer")
    sae_of, summary = grouping.sae_of_layer, summary_of(folder)
    cost, saes = summary["cost"], summary["groups"]
    ledger = read_json(folder / "ledger.json") or {}
    (planned,) = (part["planned_flops"] for part in ledger["parts"] if part["part"] == "saes")
    delta_ce = {
        row["layer"]: row["delta_ce"]["value"]
        for row in (read_json(folder / EVALUATION) or {"results": []})["results"]
        if sae_of[row["layer"]] == row["sae"]
    }
    suite = load_suite(folder, grouping.name)
    f1, auc = looked(folder, grouping.name)

    def mean(of_layer: Callable[[int], float]) -> float:
        return float(np.mean([of_layer(layer) for layer in grouping.grouped]))

    return Figures(
        tokens=summary["tokens"],
        steps=summary["steps"],
        flops=cost["total_per_layer" if arm == LAYERS else "total"],
        fixed_flops=cost["calibration"] + cost["distances"],
        sae_flops=planned * len(set(sae_of.values())) // ledger["num_saes"],
        fvu=mean(lambda x: saes[sae_of[x]]["fvu_per_layer"][str(x)]),
        delta_ce=mean(lambda x: delta_ce.get(x, float("nan"))),
        dead=mean(lambda x: saes[sae_of[x]]["dead"]),
        mmcs=float(np.mean([mmcs(*(suite[x].W_dec for x in pair)).mean() for pair in pairs])),
        f1=f1,
        auc=auc,
    )


def choose_rates(study: Study) -> tuple[Rates, list[str]]:
    """Return the rate of every arm, and the table of FVU on the first seed that chose it."""
    if len(study.rates) == 1:
        return dict.fromkeys(study.arms, study.rates[0]), []
    grid = {
        arm: [study.command(arm, study.seeds[0], rate, study.tokens) for rate in study.rates]
        for arm in (LAYERS, GROUP, MAPS)
    }
    train([each for commands in grid.values() for each in commands], study.jobs, evaluate=False)
    best, rows = {}, []
    for arm, commands in grid.items():
        fvu = [summary_of(folder_of(command))["fvu"] for command in commands]
        best[arm] = study.rates[int(np.argmin(fvu))]
        rows.append([arm, *(f"{x:.4f}" for x in fvu), best[arm]])
    columns = ["SAEs", *(f"base_lr={rate}" for rate in study.rates), "chosen"]
    lines = ["### Learning rate: FVU on the first seed, all layers", "", *table(columns, rows)]
    return {arm: best.get(arm, best[MAPS]) for arm in study.arms}, lines


def trained(
    study: Study, rates: Rates, tokens: Mapping[str, int], *, evaluate: bool
) -> dict[str, list[Figures]]:
    """Return arm -> its figures, seed by seed, with so many tokens; train what is missing."""
    every = {
        arm: [study.command(arm, seed, rates[arm], each) for seed in study.seeds]
        for arm, each in tokens.items()
    }
    # seed after seed of one arm: runs at the same time then fill different parts of the store
    missing = [each for arm, runs in every.items() if not study.reads(arm) for each in runs]
    train(missing, study.jobs, evaluate=evaluate)
    folders = {arm: study.folders(arm, runs) for arm, runs in every.items()}
    if evaluate and study.looks:
        look_into([each for runs in folders.values() for each in runs], study.jobs)
    plan = load_plan(folders[GROUP][0])
    assert plan is not None
    pairs = [pair for group in plan.partition.groups for pair in pairwise(group)]
    return {arm: [figures(each, arm, pairs) for each in runs] for arm, runs in folders.items()}


def at_equal_flops(study: Study, found: Mapping[str, list[Figures]]) -> dict[str, int]:
    """Return arm -> the tokens at which its training costs what that of one SAE per layer does."""
    layers, tokens = found[LAYERS][0], {LAYERS: study.tokens}
    for arm in (each for each in found if each not in (LAYERS, BIASES)):  # biases cost nothing
        own = found[arm][0]
        more = (layers.flops - own.fixed_flops) / (own.flops - own.fixed_flops)
        step = own.tokens // own.steps
        tokens[arm] = int(own.tokens * more) // step * step
    return tokens


def shown(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return mean and half-width of the interval over seeds; a dash without a mean."""
    mean, half = over_seeds(np.array(values))
    return "–" if np.isnan(mean) else f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def compared(found: Mapping[str, list[Figures]]) -> list[str]:
    """Return a table of the arms; costs and differences are against one SAE per layer."""
    rows, layers = [], found[LAYERS]
    for arm, runs in found.items():
        lost = [run.fvu - other.fvu for run, other in zip(runs, layers, strict=True)]
        flops = [run.flops / other.flops for run, other in zip(runs, layers, strict=True)]
        saes = [run.sae_flops / other.sae_flops for run, other in zip(runs, layers, strict=True)]
        rows.append([
            arm, f"{runs[0].tokens:,}", f"{runs[0].steps:,}", f"{np.mean(saes):.0%}",
            f"{np.mean(flops):.1%}", shown([r.fvu for r in runs], 4),
            "" if arm == LAYERS else shown(lost, 4, "+"), shown([r.delta_ce for r in runs], 3),
            f"{np.mean([r.dead for r in runs]):.1%}", f"{np.mean([r.mmcs for r in runs]):.3f}",
            shown([r.f1 for r in runs], 3), shown([r.auc for r in runs], 3),
        ])  # fmt: skip
    columns = ["SAEs", "tokens", "steps", "SAE FLOPs", "all FLOPs", "FVU", "− per layer"]
    columns += ["ΔCE, nats", "dead", "MMCS", "F1 of rules", "AUC of one latent"]
    known = [i for i, cells in enumerate(zip(*rows, strict=True)) if set(cells) != {"–"}]
    return table([columns[i] for i in known], [[row[i] for i in known] for row in rows])


def verdict(found: Mapping[str, list[Figures]]) -> list[str]:
    """Return the two goals with what came out, from the runs at equal tokens and steps."""
    lines, base = [], STARTED if STARTED in found else GROUP  # biases start alike
    pairs = zip(found[LAYERS], found[base], strict=True)
    gaps = [(group.fvu, group.fvu - layers.fvu) for layers, group in pairs]
    for arm in (each for each in (BIASES, MAPS) if each in found):
        closed = [(fvu - run.fvu) / gap for run, (fvu, gap) in zip(found[arm], gaps, strict=True)]
        more = found[arm][0].flops / found[GROUP][0].flops - 1
        met = np.mean(closed) >= 0.5 and more <= 0.02
        lines.append(
            f"- *{arm}*: {shown([100 * x for x in closed], 0)} % of the gap between *{base}* and "
            f"one SAE per layer closed for {more:.1%} more FLOPs; goal (half of it for at most "
            f"2 %): {'met' if met else 'not met'}."
        )
    layers = found[LAYERS]
    for arm in (each for each in found if "rows" in each):
        runs = found[arm]
        lost = [run.fvu - other.fvu for run, other in zip(runs, layers, strict=True)]
        share = runs[0].sae_flops / layers[0].sae_flops
        met = np.mean(lost) <= 0 and share <= 0.5
        lines.append(
            f"- *{arm}*: FVU {shown(lost, 4, '+')} against one SAE per layer at {share:.0%} of "
            "its SAE FLOPs; goal (at or below 0 at no more than 50 %): "
            f"{'met' if met else 'not met'}."
        )
    return [*lines, ""]


def report(study: Study) -> list[str]:
    """Train what is missing; return all tables, line by line."""
    rates, chosen = choose_rates(study)
    tokens = trained(study, rates, dict.fromkeys(study.arms, study.tokens), evaluate=True)
    lines = [
        f"{len(study.seeds)} seeds; {study.tokens:,} tokens per SAE at equal tokens; base_lr "
        f"{', '.join(dict.fromkeys(rates.values()))}; all means are over the layers that are "
        "grouped, on held-out text.",
        "",
        *chosen,
        "### Equal tokens, equal steps",
        "",
        *compared(tokens),
    ]
    if not study.all:
        flops = trained(study, rates, at_equal_flops(study, tokens), evaluate=False)
        lines += ["### Equal FLOPs of the complete training", "", *compared(flops)]
    return [*lines, "### The goals, at equal tokens", "", *verdict(tokens)]


def arms_of(rows: Sequence[str], *, started: bool) -> dict[str, list[str]]:
    """Return the arms; layer-aware ones with so many rows of each token, too."""
    arms = {arm: overrides for arm, overrides in ARMS.items() if started or arm != STARTED}
    return arms | {
        f"the same, {count} rows of a token": [*arms[MAPS], f"stream.layers_per_token={count}"]
        for count in rows
    }


def main(arguments: Sequence[str]) -> None:
    """Train, compare, and write the tables."""
    quiet()
    if smallest():
        with tempfile.TemporaryDirectory() as output:
            given = [*SMALLEST_RUN, f"output={output}", f"data.cache={output}/store"]
            arms = arms_of(["2"], started=False)
            del arms[BIASES]
            print("\n".join(report(Study(["0"], 256, 1, ["5e-4"], given, arms))))
        return
    own = {
        "seed": "0,1,2",
        "tokens": "1_024_000",
        "jobs": "1",
        "rates": "5e-4",
        "rows": "2",
        "all": "",
        "looks": "true",
    }
    given = []
    for argument in without_size(arguments):
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        else:
            given.append(argument)
    runs = [Path(each) for each in own["all"].split(",") if each]
    seeds, rates = own["seed"].split(","), own["rates"].split(",")
    arms = arms_of(own["rows"].split(","), started=bool(runs))
    study = Study(
        seeds,
        int(own["tokens"]),
        int(own["jobs"]),
        rates,
        given,
        arms,
        runs,
        own["looks"] == "true",
    )
    write_figures(DOC, BEGIN_ALL if runs else BEGIN, report(study))


if __name__ == "__main__":
    main(sys.argv[1:])
