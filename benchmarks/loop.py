"""The whole training loop and its parts: `python -m benchmarks.loop [models=tiny] [overrides]`.

Tokens per second of a real run by Lightning, of the language model alone and of the SAEs' steps
alone (the same batch again and again), in interleaved blocks of one run; and what the loop costs
outside of the three. Overrides are those of groupsae.train, such as `trainer=gpu`. Models:

    tiny          the bundled model with its default groups
    pythia-70m    a random GPT-NeoX of that shape, an SAE of 4,096 latents, k 32, on each layer
    pythia-160m, pythia-410m, pythia-1b
                  random, with as many SAEs as the paper published, its sizes and its context

The first two are run by default: two to three minutes on two cores. The others are for a GPU:

    python -m benchmarks.loop models=pythia-160m,pythia-410m,pythia-1b trainer=gpu \
        model.dtype=bfloat16 sae.selection=bfloat16

`size=smallest` takes a few steps on the bundled model, for CI.
Writes benchmarks/results/loop.md, with the options in its name.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.profilers import SimpleProfiler
from rich.console import Console

from benchmarks.timing import SMALLEST_RUN, now, random_model, smallest, without_size, write
from groupsae.app.fit import Run, build
from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import CONF
from groupsae.runtime.quiet import quiet

ROUNDS = 4  # the first is not counted
BUNDLED, VOCAB = "tiny", 50304
ON_RANDOM = [
    "model=hf", "stream.max_tokens=1_000_000", "stream.heldout_fraction=0.1",
    "stream.calibration_fraction=0.1",
]  # fmt: skip
SMALL = [
    "groups=per_layer", "sae.expansion=8", "sae.k=32", "stream.context=256",
    "stream.blocks_per_step=8", "stream.blocks_per_forward=8", "stream.num_workers=0",
]  # fmt: skip


class Shape(NamedTuple):
    """A language model with random weights, and how it is trained on."""

    num_layers: int
    d_model: int
    num_heads: int
    context: int
    overrides: list[str]


def published(num_groups: int) -> list[str]:
    """Return the paper's sizes with its number of groups for theta 0.2, without the last layer."""
    return [
        "groups=even", f"groups.num_groups={num_groups}", "sae.expansion=16", "sae.k=128",
        "stream.context=1024",
    ]  # fmt: skip


SHAPES = {
    "pythia-70m": Shape(6, 512, 8, 256, SMALL),
    "pythia-160m": Shape(12, 768, 12, 1024, published(6)),
    "pythia-410m": Shape(24, 1024, 16, 1024, published(9)),
    "pythia-1b": Shape(16, 2048, 8, 1024, published(6)),
}
MODELS, DEFAULT = (BUNDLED, *SHAPES), (BUNDLED, *(() if smallest() else ("pythia-70m",)))
STEPS = {BUNDLED: 2 if smallest() else 20}  # in a block
FEW_STEPS = 6  # of all others
WHOLE, SAES, MODEL = "whole loop", "SAE steps alone", "language model alone"
# what Lightning's profiler calls them; forward and backward run inside the optimiser's step
LANGUAGE_MODEL = ("DataModule.on_before_batch_transfer", "DataModule.on_after_batch_transfer")


class Blocks(L.Callback):
    """Lets blocks of steps take turns: with the language model, without, and it alone."""

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps, self.repeat, self.last = run, steps, False, None
        self.make, run.data.live.rows = run.data.live.rows, self.shown
        self.profiler = run.trainer.profiler = SimpleProfiler()
        self.seconds: dict[str, list[float]] = {WHOLE: [], SAES: [], MODEL: []}
        self.parts: dict[str, list[float]] = {}

    def shown(self, *drawn: Any) -> Any:
        """Make activations, or show the last ones again."""
        if not self.repeat or self.last is None:
            self.last = self.make(*drawn)
        return self.last

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the first block."""
        self.tokens = next(iter(self.run.data.train_dataloader()))
        self._start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        """End a block, and start the next."""
        if trainer.global_step % self.steps:
            return
        device, name = pl_module.device, SAES if self.repeat else WHOLE
        self.seconds[name].append(now(device) - self.started)
        if name == WHOLE:
            for part, seconds in self._profiled().items():
                self.parts.setdefault(part, []).append(seconds - self.before.get(part, 0.0))
        else:
            start, data = now(device), self.run.data
            for _ in range(self.steps):
                self.make(data.drawn(self.tokens, data.exchanges[0]).to(device))
            self.seconds[MODEL].append(now(device) - start)
            print(f"round {len(self.seconds[MODEL]) - 1} of {ROUNDS - 1}", flush=True)
        self.repeat = not self.repeat
        self._start()

    def _start(self) -> None:
        self.before, self.started = self._profiled(), now(self.run.data.device)

    def _profiled(self) -> dict[str, float]:
        """Return the seconds of each part up to here."""

        def total(*ends: str) -> float:
            durations = self.profiler.recorded_durations.items()
            return sum(sum(seconds) for action, seconds in durations if action.endswith(ends))

        parts = {
            "language model, drawn rows": total(*LANGUAGE_MODEL),
            "SAEs forward": total("training_step"),
            "SAEs backward": total("backward"),
        }
        whole = total("optimizer_step")
        parts["optimiser"] = whole - parts["SAEs forward"] - parts["SAEs backward"]
        return parts


def measured(steps: int, overrides: Sequence[str]) -> tuple[Blocks, str]:
    """Train for all rounds; return what was timed, and a few words on the run."""
    with tempfile.TemporaryDirectory() as folder:
        given = [
            f"output={folder}", "eval_every=1_000_000", "checkpoint_every=1_000_000",
            "calibration.tokens=20_000", "stream.heldout_tokens=4096",
            "+trainer.enable_progress_bar=false", *overrides,
        ]  # fmt: skip
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            cfg = compose("train", given)
            size = cfg.stream.blocks_per_step * cfg.stream.context
            cfg = compose("train", [*given, f"tokens={2 * ROUNDS * steps * size}"])
        run = build(cfg, Path(folder) / "run", Console())
        blocks = Blocks(run, steps)
        run.trainer.callbacks.append(blocks)
        run.trainer.fit(run.suite, datamodule=run.data)
    members = run.suite.members()
    widths = "/".join(f"{width:,}" for width in sorted({m.sae.d_sae for m in members}))
    tokens = f"{run.data.tokens_per_step:,} tokens per step"
    return blocks, f"{tokens}, {len(members)} SAEs of {widths} latents"


def column(blocks: Blocks) -> dict[str, str]:
    """Return the cells of one model, by row."""
    tokens = blocks.run.data.tokens_per_step
    ms = {
        name: 1000 * statistics.median(seconds[1:]) / blocks.steps
        for name, seconds in (blocks.seconds | blocks.parts).items()
    }
    cells = {
        f"{name}: ms per step (tokens/s)": f"{ms[name]:.1f} ({1000 * tokens / ms[name]:,.0f})"
        for name in (WHOLE, MODEL, SAES)
    }
    cells["whole loop / (model alone + SAE steps alone)"] = (
        f"{ms[WHOLE] / (ms[MODEL] + ms[SAES]):.3f}"
    )
    if blocks.run.data.device.type == "cuda":  # the profiler knows of the host only
        return cells
    for name in blocks.parts:
        cells[f"in the loop: {name}"] = f"{ms[name]:.1f} ({ms[name] / ms[WHOLE]:.1%})"
    rest = ms[WHOLE] - sum(ms[name] for name in blocks.parts)
    cells["in the loop: everything else"] = f"{rest:.1f} ({rest / ms[WHOLE]:.1%})"
    return cells


def chosen(arguments: Sequence[str]) -> list[str]:
    """Return the models to measure.

    Raises:
        SystemExit: one is unknown; the message names those that are known.
    """
    given = [a.removeprefix("models=").split(",") for a in arguments if a.startswith("models=")]
    names = given[-1] if given else list(DEFAULT)
    for name in names:
        if name not in MODELS:
            raise SystemExit(f"error: models={name} is unknown: use {', '.join(MODELS)}.")
    return names


def main(arguments: Sequence[str]) -> None:
    """Measure the models and write the table."""
    names = chosen(arguments)
    quiet()
    register_resolver()
    overrides = [a for a in without_size(arguments) if not a.startswith("models=")]
    overrides = [*SMALLEST_RUN, *overrides] if smallest() else overrides
    columns, about, device = {}, [], torch.device("cpu")
    for name in names:
        print(name, flush=True)
        with ExitStack() as stack:
            given = [f"model={BUNDLED}"]
            if name in SHAPES:
                *sizes, own = SHAPES[name]
                size = dict(zip(Shape._fields, sizes, strict=False))
                folder = stack.enter_context(random_model(**size, vocab_size=VOCAB))
                given = [*ON_RANDOM, *own, f"model.name={folder}"]
            blocks, words = measured(STEPS.get(name, FEW_STEPS), [*given, *overrides])
        columns[name], device = column(blocks), blocks.run.data.device
        about.append(f"{name}{', random weights' * (name in SHAPES)}: {words}")
        del blocks  # or this model and its SAEs would still fill the device next to the next one
    rows = next(iter(columns.values()))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [f"| {row} | {' | '.join(c[row] for c in columns.values())} |" for row in rows]
    write(
        "loop",
        "The whole training loop",
        "\n".join(lines),
        device,
        f"{'; '.join(about)}. Medians of {ROUNDS - 1} rounds of blocks that follow each other in "
        "one run. SAE steps alone: the same batch of activations again and again, in Lightning's "
        "loop with its loader, callbacks and logging, and with the draws of layers on the host, "
        "so all of that is in these blocks as well. Language model alone: draws and forward. "
        "Everything else: loop, callbacks, logging, loader.",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
