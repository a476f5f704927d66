"""The tables of docs/better-groups.md: `python -m benchmarks.better_groups seed=0,1,2`.

Trains, in child processes of `python -m groupsae.train`, one SAE per layer, the paper's group
SAEs, layer-aware ones, and layer-aware ones on several rows of each token; then compares them at
equal tokens of the language model (which are equal steps here) and at equal FLOPs of the complete
training, the language model's included. Runs at equal tokens are also interpreted and probed.
Finished runs are reused, so it can be stopped and given again; activations of a seed are computed
once and kept in outputs/store (6 KB a token, float32). Writes the part between the two marks in
docs/better-groups.md.

Options: `tokens=` for each SAE, `jobs=` runs at a time, and any override of the training.
`size=smallest` is for CI: some SAEs, one seed, one step, in this process, and it only prints.

Fair to all: the same text, steps and seeds; decoder biases start at the mean everywhere. The
learning rate is the best of `RATES` on the first seed, for one SAE per layer, the paper's group
SAEs and those with maps, whose rate the other layer-aware ones take. Intervals are Student's t
over seeds, 95 %; differences are paired by seed.
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]

import groupsae
from benchmarks.replication import folder_of, over_seeds, table, write_figures
from benchmarks.timing import SMALLEST_RUN, smallest, without_size
from groupsae.evaluation.similarity import mmcs
from groupsae.files.reading import read_json
from groupsae.runtime.quiet import quiet
from groupsae.suite.suite import load_suite

DOC = Path(__file__).parent.parent / "docs" / "better-groups.md"
BEGIN = "<!-- figures: python -m benchmarks.better_groups -->"
RANK, ROWS = 8, (2, 4)  # of the maps; rows of each token
LAYERS, GROUP, BIASES, MAPS = (
    "one SAE per layer", "group (the paper's)", "group, own biases",
    f"group, own biases, rank {RANK}",
)  # fmt: skip
SEVERAL = tuple(f"the same, {rows} rows of a token" for rows in ROWS)
ARMS = {LAYERS: ["groups=per_layer"], GROUP: ["groups=amad"]}
ARMS[BIASES] = [*ARMS[GROUP], "sae.layer_bias=per_layer"]
ARMS[MAPS] = [*ARMS[BIASES], f"sae.layer_rank={RANK}"]
ARMS |= {
    arm: [*ARMS[MAPS], f"stream.layers_per_token={rows}"]
    for arm, rows in zip(SEVERAL, ROWS, strict=True)
}
RATES = ("5e-4", "1e-3", "2e-3")
SMALL = (LAYERS, GROUP, MAPS, SEVERAL[0])  # of size=smallest, which evaluates nothing
STUDY = [  # of every run
    "b_dec_start=mean", "stream.heldout_tokens=16_384", "evaluation.tokens=8_192",
    "evaluation.bootstrap.resamples=10", "eval_every=1_000_000", "checkpoint_every=1_000_000",
    "+trainer.enable_progress_bar=false", "data.cache=outputs/store", "data.cache_dtype=float32",
]  # fmt: skip
SPEED, FIXED = 7_000, 40  # tokens a second, and seconds of start and evaluation, on two AVX2 cores
EVALUATION = Path("evaluation") / "evaluation.json"
LATENTS = 32  # of each SAE that rules explain
INTERPRET = [
    f"interpretation.latents={LATENTS}", "interpretation.explain_tokens=24_576",
    "interpretation.score_tokens=24_576", "interpretation.top=4", "interpretation.sample=10",
    "interpretation.across=2", "logger=none",
]  # fmt: skip
LOOKS = {  # into runs at equal tokens: the file each leaves -> its command
    Path("interpretation") / "groupings.csv": ["groupsae.interpret", *INTERPRET],
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
    arms: Sequence[str] = tuple(ARMS)

    def command(self, arm: str, seed: str, rate: str, tokens: int) -> list[str]:
        """Return the overrides of one run."""
        own = [f"seed={seed}", f"optim.base_lr={rate}", f"tokens={tokens}"]
        return [*STUDY, *ARMS[arm], *self.given, *own]


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
    start = [sys.executable, "-m", "groupsae.train", more]
    with ThreadPoolExecutor(jobs) as pool:
        run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
        for number, _ in enumerate(pool.map(lambda each: run([*start, *each]), missing), 1):
            print(f"{number} of {len(missing)}", flush=True)


def look_into(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """Interpret and probe finished runs, where that has not been done."""
    missing = [
        (module, f"run={folder}", *options)
        for folder in map(folder_of, commands)
        for file, (module, *options) in LOOKS.items()
        if not (folder / file).exists()
    ]
    print(f"{len(missing)} interpretations and probes to make", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
        for number, _ in enumerate(
            pool.map(lambda each: run([sys.executable, "-m", *each]), missing), 1
        ):
            print(f"{number} of {len(missing)}", flush=True)


def looked(folder: Path) -> tuple[float, float]:
    """Return F1 of rules and AUC of probes of a run; nan for what it does not have."""
    explained, probes = (folder / file for file in LOOKS)
    f1 = auc = float("nan")
    if explained.exists():
        f1 = float(pd.read_csv(explained)["f1"].iloc[0])
    if found := read_json(probes):
        auc = found["groupings"][0]["auc_1"]["value"]
    return f1, auc


def summary_of(command: Sequence[str]) -> dict[str, Any]:
    """Return the summary of a finished run."""
    return dict(json.loads((folder_of(command) / "summary.json").read_text()))


def figures(command: Sequence[str], pairs: Sequence[tuple[int, int]]) -> Figures:
    """Return the figures of a finished run; `pairs` are the layers that MMCS compares."""
    folder, summary = folder_of(command), summary_of(command)
    ledger = json.loads((folder / "ledger.json").read_text())
    effects = read_json(folder / EVALUATION) or {"results": []}
    cost, groups = summary["cost"], [summary["groups"][name] for name in summary["chosen"]]
    last = max(layer for group in groups for layer in group["layers"])
    fvu = {int(x): v for group in groups for x, v in group["fvu_per_layer"].items()}
    dead = {x: group["dead"] for group in groups for x in group["layers"]}
    delta_ce: dict[int, float] = defaultdict(lambda: float("nan"))
    delta_ce |= {row["layer"]: row["delta_ce"]["value"] for row in effects["results"]}
    suite = load_suite(folder)
    alike = [mmcs(*(suite[layer].W_dec for layer in pair)).mean() for pair in pairs]
    (sae_flops,) = (p["planned_flops"] for p in ledger["parts"] if p["part"] == "saes")
    f1, auc = looked(folder)

    def mean(of_layer: Mapping[int, float]) -> float:
        return float(np.mean([of_layer[layer] for layer in range(last)]))

    return Figures(
        tokens=summary["tokens"],
        steps=summary["steps"],
        flops=cost["total"],
        fixed_flops=cost["calibration"] + cost["distances"],
        sae_flops=sae_flops,
        fvu=mean(fvu),
        delta_ce=mean(delta_ce),
        dead=mean(dead),
        mmcs=float(np.mean(alike)),
        f1=f1,
        auc=auc,
    )


def choose_rates(study: Study) -> tuple[Rates, list[str]]:
    """Return the rate of every arm, and the table of FVU on the first seed that chose it."""
    grid = {
        arm: [study.command(arm, study.seeds[0], rate, study.tokens) for rate in study.rates]
        for arm in (LAYERS, GROUP, MAPS)
    }
    train([each for commands in grid.values() for each in commands], study.jobs, evaluate=False)
    best, rows = {}, []
    for arm, commands in grid.items():
        fvu = [summary_of(command)["fvu"] for command in commands]
        best[arm] = study.rates[int(np.argmin(fvu))]
        rows.append([arm, *(f"{x:.4f}" for x in fvu), best[arm]])
    columns = ["SAEs", *(f"base_lr={rate}" for rate in study.rates), "chosen"]
    return {arm: best.get(arm, best[MAPS]) for arm in study.arms}, table(columns, rows)


def trained(
    study: Study, rates: Rates, tokens: Mapping[str, int], *, evaluate: bool
) -> dict[str, list[Figures]]:
    """Return arm -> its figures, seed by seed, with so many tokens; train what is missing."""
    every = {
        arm: [study.command(arm, seed, rates[arm], each) for seed in study.seeds]
        for arm, each in tokens.items()
    }
    # seed after seed of one arm: runs at the same time then fill different parts of the store
    commands = [each for runs in every.values() for each in runs]
    train(commands, study.jobs, evaluate=evaluate)
    if evaluate and not smallest():
        look_into(commands, study.jobs)
    pairs = neighbours(every[GROUP][0])
    return {arm: [figures(each, pairs) for each in runs] for arm, runs in every.items()}


def at_equal_flops(study: Study, found: Mapping[str, list[Figures]]) -> dict[str, int]:
    """Return arm -> the tokens at which its training costs what that of one SAE per layer does."""
    layers, tokens = found[LAYERS][0], {LAYERS: study.tokens}
    for arm in (each for each in found if each != LAYERS):
        own = found[arm][0]
        more = (layers.flops - own.fixed_flops) / (own.flops - own.fixed_flops)
        step = own.tokens // own.steps
        tokens[arm] = int(own.tokens * more) // step * step
    return tokens


def neighbours(command: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of neighbouring layers that share one of a run's groups."""
    groups = summary_of(command)["groups"].values()
    return [pair for group in groups for pair in pairwise(group["layers"])]


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
    return table(columns, rows)


def verdict(found: Mapping[str, list[Figures]]) -> list[str]:
    """Return the two goals with what came out, from the runs at equal tokens and steps."""
    lines = []
    trios = zip(found[LAYERS], found[GROUP], strict=True)
    gaps = [(group.fvu, group.fvu - layers.fvu) for layers, group in trios]
    for arm in (each for each in (BIASES, MAPS) if each in found):
        closed = [(fvu - run.fvu) / gap for run, (fvu, gap) in zip(found[arm], gaps, strict=True)]
        more = found[arm][0].flops / found[GROUP][0].flops - 1
        met = np.mean(closed) >= 0.5 and more <= 0.02
        lines.append(
            f"- *{arm}*: {shown([100 * x for x in closed], 0)} % of the gap closed for {more:.1%} "
            f"more FLOPs; goal (half of it for at most 2 %): {'met' if met else 'not met'}."
        )
    layers = found[LAYERS]
    for arm in (each for each in SEVERAL if each in found):
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
    flops = trained(study, rates, at_equal_flops(study, tokens), evaluate=False)
    return [
        f"{len(study.seeds)} seeds; {study.tokens:,} tokens per SAE at equal tokens; all means "
        "are over the layers that are grouped, on held-out text.",
        "",
        "### Learning rate: FVU on the first seed, all layers",
        "",
        *chosen,
        "### Equal tokens, equal steps",
        "",
        *compared(tokens),
        "### Equal FLOPs of the complete training",
        "",
        *compared(flops),
        "### The goals, at equal tokens",
        "",
        *verdict(tokens),
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Train, compare, and write the tables."""
    quiet()
    if smallest():
        with tempfile.TemporaryDirectory() as output:
            given = [*SMALLEST_RUN, f"output={output}", f"data.cache={output}/store"]
            print("\n".join(report(Study(["0"], 256, 1, RATES[:1], given, SMALL))))
        return
    own = dict(a.split("=", 1) for a in arguments if a.startswith(("seed=", "tokens=", "jobs=")))
    given = [a for a in without_size(arguments) if not a.startswith(("seed=", "tokens=", "jobs="))]
    seeds = own.get("seed", "0,1,2").split(",")
    study = Study(seeds, int(own.get("tokens", 204_800)), int(own.get("jobs", 1)), RATES, given)
    write_figures(DOC, BEGIN, report(study))


if __name__ == "__main__":
    main(sys.argv[1:])
