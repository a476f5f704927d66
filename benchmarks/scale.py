"""What many GPUs give, on paper: `python -m benchmarks.scale [measure=true]`.

For Pythia-1B, Pythia-6.9B and a model of 70B on 8, 64 and 512 GPUs: memory of a process, bytes
moved in a step and tokens per second, for DDP and for SAE-parallel, from the cost model and a
small simulation of a step. With `measure=true` the same simulation first predicts, then is held
against, runs of two gloo processes on this machine (five minutes on two cores; `size=smallest`
takes one).

Writes benchmarks/results/scale.md.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import options, smallest, write
from groupsae.cost.model import activation_flops
from groupsae.training.estimate import FLOAT, ROWS, STATE, WIDE
from groupsae.training.parallel.placement import Cost, place

K, CONTEXT, BLOCKS, FORWARD = 128, 1024, 32, 16  # the paper's, and conf/train.yaml's
CARD = 80e9  # bytes of one GPU


class Model(NamedTuple):
    """A language model, and the SAEs trained on it: half as many groups as layers, and one."""

    name: str
    num_layers: int
    d_model: int
    parameters: float

    @property
    def num_saes(self) -> int:
        """Return how many SAEs are trained."""
        return self.num_layers // 2 + 1


class Speed(NamedTuple):
    """What a machine does in a second. GPUs: H100 or H200, eight to a node.

    Attributes:
        lm: FLOPs of the language model's forward in bfloat16.
        sae: FLOPs of an SAE's step that grow with its rows, sae.selection=bfloat16.
        update: seconds of a step for each weight, whatever the rows.
        inside: bytes between the GPUs of a node, for each.
        between: bytes between nodes, for each GPU: of an all-to-all nearly all go there.
        reduce: bytes of an all-reduce, for each GPU, between nodes as well: there each GPU of a
            node sends an eighth of the sum that was made inside.
    """

    lm: float = 300e12
    sae: float = 100e12
    update: float = 41e-12
    inside: float = 300e9
    between: float = 40e9
    reduce: float = 300e9

    def link(self, processes: int) -> float:
        """Return the bytes of an all-to-all that each process moves in a second."""
        return self.inside if processes <= 8 else self.between


MODELS = (
    Model("Pythia-1B", 16, 2048, 1.0e9),
    Model("Pythia-6.9B", 32, 4096, 6.9e9),
    Model("70B", 80, 8192, 70e9),
)
GPUS = (1, 8, 64, 512)


class Times(NamedTuple):
    """Seconds of one process, from which a step is put together.

    Attributes:
        forward: of the language model, one for each part of a share.
        swap: of the all-to-all that each part starts.
        saes: of each process's SAEs in a step.
        reduce: of all gradients' all-reduce, at the same time as half of the step's backward pass.
    """

    forward: list[float]
    swap: list[float]
    saes: list[float]
    reduce: float


def simulate(times: Times, steps: int = 20) -> float:
    """Return the seconds of a step once all processes are under way.

    A process runs its forwards one after the other. The rows of a part travel as soon as every
    process has made its own, one part after the other, during the next forward. When the last
    part is there, a process steps its SAEs and starts the next step; one with few SAEs is
    early, and waits for the others at the next part.
    """
    free = [0.0] * len(times.saes)
    finished = []
    for _ in range(steps):
        arrived, began = 0.0, list(free)
        for forward, swap in zip(times.forward, times.swap, strict=True):
            began = [start + forward for start in began]
            arrived = max(arrived, max(began) if swap else 0.0) + swap
        free = [
            max(end, arrived) + saes + max(0.0, times.reduce - saes / 2)
            for end, saes in zip(began, times.saes, strict=True)
        ]
        if times.reduce:
            free = [max(free)] * len(free)
        finished.append(max(free))
    return (finished[-1] - finished[steps // 2 - 1]) / (steps - steps // 2)


class Figures(NamedTuple):
    """Of one way to train.

    Attributes:
        memory: bytes of the process that needs most: the language model and the SAEs.
        moved: bytes that it sends to others in a step.
        seconds: of a step.
        tokens: of a step.
    """

    memory: float
    moved: float
    seconds: float
    tokens: int


def figures(model: Model, processes: int, mode: str, speed: Speed) -> Figures:
    """Return what one way to train needs and gives; `mode` is ddp or sae_parallel."""
    blocks = max(BLOCKS, processes)  # every process needs a block
    tokens, d, n = blocks * CONTEXT, model.d_model, 16 * model.d_model
    share, weights = tokens // processes, 2 * d * n + n + d
    owned = [list(range(model.num_saes))] * processes
    if mode == "sae_parallel":
        owned = place([Cost(1, 1, i) for i in range(model.num_saes)], processes)
    rows = tokens if mode == "sae_parallel" else share
    flops = 2 * d * n + 8 * d * K
    parts = [min(FORWARD * CONTEXT, share - i) for i in range(0, share, FORWARD * CONTEXT)]
    lm = activation_flops(model.num_layers, d, CONTEXT) / speed.lm
    one = rows * flops / speed.sae + weights * speed.update
    row, others = 2 * d, (processes - 1) / processes  # bfloat16
    swap = [
        model.num_saes * part * row * others / speed.link(processes)
        if mode == "sae_parallel" and processes > 1
        else 0.0
        for part in parts
    ]
    # an owner gets more than it sends if it owns more than its share
    most = max(len(mine) for mine in owned)
    if mode == "sae_parallel":
        swap = [each * max(1.0, most * processes / model.num_saes) for each in swap]
        moved = share * model.num_saes * row * others
        reduced = 0.0
    else:
        moved = 2 * others * FLOAT * weights * model.num_saes
        reduced = moved / speed.reduce
    seconds = simulate(
        Times([lm * part for part in parts], swap, [one * len(mine) for mine in owned], reduced)
    )
    memory = (
        2 * model.parameters
        + FLOAT * STATE * weights * most
        + FLOAT * rows * (d * ROWS * most + WIDE * n)
    )
    return Figures(memory, moved, seconds, tokens)


def tables(speed: Speed) -> str:
    """Return one table for each model."""
    lines = []
    for model in MODELS:
        lines += [
            f"## {model.name}: {model.num_layers} layers, d_model {model.d_model:,}, "
            f"{model.num_saes} SAEs of {16 * model.d_model:,} latents",
            "",
            "| GPUs | tokens in a step | mode | GB of a GPU | GB sent by a GPU | ms of a step "
            "| tokens/s | speed-up | of the ideal |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        base = figures(model, 1, "ddp", speed)
        one = base.tokens / base.seconds
        for processes in GPUS:
            for mode in ("ddp", "sae_parallel") if processes > 1 else ("ddp",):
                found = figures(model, processes, mode, speed)
                rate = found.tokens / found.seconds
                fits = "" if found.memory < CARD else " **(does not fit)**"
                name = {"ddp": "DDP", "sae_parallel": "SAE-parallel"}[mode]
                lines.append(
                    f"| {processes} | {found.tokens:,} | {name if processes > 1 else 'one'} | "
                    f"{found.memory / 1e9:,.0f}{fits} | {found.moved / 1e9:,.2f} | "
                    f"{1e3 * found.seconds:,.0f} | {rate:,.0f} | {rate / one:,.1f} | "
                    f"{rate / one / processes:.0%} |"
                )
        lines.append("")
    return "\n".join(lines)


# ---- measured ---------------------------------------------------------------------------------

RUN = [
    "model=tiny", "groups=per_layer", "tokens=65536", "stream.max_tokens=400_000",
    "logger=none", "eval_every=1000",
    "checkpoint_every=1000", "calibration.tokens=4096", "stream.blocks_per_forward=2",
    "stream.heldout_tokens=4096", "log_every=100", "sae.expansion=32", "dead_after=100_000_000",
    "+trainer.enable_progress_bar=false", "stream.heldout_fraction=0.1",
    "stream.calibration_fraction=0.1",
]  # fmt: skip
SMALLER = ["tokens=4096", "stream.context=128", "sae.expansion=2", "calibration.tokens=1024"]
SIZE = 8  # blocks in a step


def measured(output: str, *more: str) -> dict[str, float]:
    """Return seconds of a step of a real run: as a whole, the model's, the SAEs'."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "groupsae.train",
            *RUN,
            *(SMALLER if smallest() else []),
            f"output={output}",
            "overwrite=true",
            *more,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    ledgers = sorted(Path(output).rglob("ledger.json"), key=lambda file: file.stat().st_mtime)
    ledger = json.loads(ledgers[-1].read_text())
    summary = json.loads((ledgers[-1].parent / "summary.json").read_text())
    parts = {part["part"]: part["seconds"] / summary["steps"] for part in ledger["parts"]}
    return {
        "step": summary["seconds_training"] / summary["steps"],
        "lm": parts["activations"],
        "saes": parts["saes"],
        "num_saes": float(ledger["num_saes"]),
    }


def comparison() -> str:
    """Return predictions for two processes, and what they then took."""
    two = ["trainer.accelerator=cpu", "trainer.devices=2"]
    with tempfile.TemporaryDirectory() as output:
        whole, half, ddp, spread = [], [], [], []
        for number in range(1 if smallest() else 3):
            whole.append(measured(output, f"stream.blocks_per_step={SIZE}"))
            half.append(measured(output, f"stream.blocks_per_step={SIZE // 2}"))
            if number == 0 and not smallest():
                continue  # text and distances are cached from now on
            ddp.append(measured(output, f"stream.blocks_per_step={SIZE}", "trainer=ddp", *two))
            spread.append(
                measured(output, f"stream.blocks_per_step={SIZE}", "trainer=sae_parallel", *two)
            )
    one, less = _least(whole), _least(half)
    rest = one["step"] - one["lm"] - one["saes"]
    count = int(one["num_saes"])
    owned = place([Cost(1, 1, i) for i in range(count)], 2)
    lm = [one["lm"] / SIZE * 2] * (SIZE // 4)  # forwards of two blocks, half of them each
    shares = [one["saes"] * len(mine) / count for mine in owned]
    predicted = {
        "one process": one["step"],
        # the gradients' way through this machine's memory is taken to cost nothing
        "DDP": rest + simulate(Times(lm, [0.0] * len(lm), [less["saes"]] * 2, 0.0)),
        "SAE-parallel": rest + simulate(Times(lm, [1e-9] * len(lm), shares, 0.0)),
    }
    took = {"one process": one, "DDP": _least(ddp), "SAE-parallel": _least(spread)}
    lines = [
        f"## Two processes on this machine: bundled model, {count} SAEs, {SIZE} blocks in a step",
        "",
        "| | predicted, ms of a step | measured | measured / predicted | speed-up |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in predicted.items():
        found = took[name]["step"]
        lines.append(
            f"| {name} | {1e3 * seconds:.0f} | {1e3 * found:.0f} | {found / seconds:.2f} | "
            f"{one['step'] / found:.2f} |"
        )
    return "\n".join(lines)


def _least(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the run of the shortest step: a shared machine only makes it longer."""
    return min(runs, key=lambda run: run["step"])


def main() -> None:
    """Print the tables; with `measure=true` hold the simulation against runs."""
    given = options(sys.argv[1:], measure=("false", "true|false"))
    speed = Speed()
    text = tables(speed)
    if given["measure"] == "true":
        text += "\n" + comparison()
    notes = (
        f"Assumed: {speed.lm / 1e12:.0f} TFLOP/s for the language model in bfloat16, "
        f"{speed.sae / 1e12:.0f} TFLOP/s and {speed.update * 1e12:.0f} ps per weight for an SAE "
        f"(as measured on an H200 at d_model 2,048), {speed.inside / 1e9:.0f} GB/s between the "
        f"GPUs of a node and {speed.between / 1e9:.0f} GB/s for each between nodes, all-reduce at "
        f"{speed.reduce / 1e9:.0f} GB/s on both; {CONTEXT:,} "
        f"tokens in a block, k = {K}, rows travel in bfloat16, GPUs of {CARD / 1e9:.0f} GB."
    )
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "measure=true"]
    write("scale", "What many GPUs give, on paper", text, torch.device("cpu"), notes)


if __name__ == "__main__":
    main()
