"""The whole training loop and its parts: `python -m benchmarks.loop [models=tiny] [overrides]`.

Tokens per second of a real run by Lightning, of the language model alone and of the SAEs' steps
alone (the same batch again and again), in interleaved blocks of one run; and what the loop costs
outside of the three. For the bundled model with its default groups, and for a random GPT-NeoX of
Pythia-70M's shape with an SAE of 4,096 latents, k 32, on each of its six layers. Overrides are
those of groupsae.train, such as `trainer=gpu model.dtype=bfloat16`. Two to three minutes on two
cores. Writes benchmarks/results/loop.md.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.profilers import SimpleProfiler
from rich.console import Console

from benchmarks.timing import now, random_model, write
from groupsae.config import CONF
from groupsae.fit import Run, build
from groupsae.run import register_resolver
from groupsae.screen import quiet

ROUNDS = 4  # the first is not counted
STEPS = {"tiny": 20, "Pythia-70M's shape": 6}  # in a block
PYTHIA = {"num_layers": 6, "d_model": 512, "num_heads": 8, "vocab_size": 50304}
ON_PYTHIA = [
    "model=hf", "groups=per_layer", "sae.expansion=8", "sae.k=32", "stream.context=256",
    "stream.blocks_per_step=8", "stream.blocks_per_forward=8", "stream.num_workers=0",
    "stream.max_tokens=400_000", "stream.heldout_fraction=0.1", "stream.calibration_fraction=0.1",
]  # fmt: skip
WHOLE, SAES, MODEL = "whole loop", "SAE steps alone", "language model alone"
# what Lightning's profiler calls them; forward and backward run inside the optimiser's step
LANGUAGE_MODEL = ("DataModule.on_before_batch_transfer", "DataModule.on_after_batch_transfer")


class Blocks(L.Callback):
    """Lets blocks of steps take turns: with the language model, without, and it alone."""

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps, self.repeat, self.last = run, steps, False, None
        self.make, run.data.shown = run.data.shown, self.shown
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
                self.make(data.drawn(self.tokens, data.slots).to(device), data.slots)
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


def measured(steps: int, overrides: Sequence[str]) -> tuple[Blocks, list[str]]:
    """Train for all rounds; return what was timed, and a few words on the run."""
    with tempfile.TemporaryDirectory() as folder:
        given = [
            f"output={folder}", "eval_every=1_000_000", "checkpoint_every=1_000_000",
            "calibration.tokens=20_000", "stream.heldout_tokens=4096", "logger=none",
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
    saes = {m.sae.d_sae for m in run.suite.members()}
    return blocks, [f"{len(run.data.slots)} SAEs of {'/'.join(map(str, sorted(saes)))}"]


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


def main(arguments: Sequence[str]) -> None:
    """Measure both models and write the table."""
    quiet()
    register_resolver()
    chosen = [a.removeprefix("models=").split(",") for a in arguments if a.startswith("models=")]
    overrides = [a for a in arguments if not a.startswith("models=")]
    columns, about = {}, []
    with ExitStack() as stack:
        for name in STEPS:
            if chosen and not any(name.lower().startswith(c) for c in chosen[0]):
                continue
            given = ["model=tiny"]
            if name != "tiny":
                folder = stack.enter_context(random_model(**PYTHIA, context=256))
                given = [*ON_PYTHIA, f"model.name={folder}"]
            print(name, flush=True)
            blocks, words = measured(STEPS[name], [*given, *overrides])
            columns[name] = column(blocks)
            about.append(f"{name}: {', '.join(words)}")
            device = blocks.run.data.device
    rows = next(iter(columns.values()))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [f"| {row} | {' | '.join(c[row] for c in columns.values())} |" for row in rows]
    write(
        "loop",
        "The whole training loop",
        "\n".join(lines),
        torch.device(device),
        f"{'; '.join(about)}; {blocks.run.data.tokens_per_step:,} tokens per step. Medians of "
        f"{ROUNDS - 1} rounds of blocks that follow each other in one run. SAE steps alone: "
        "Lightning's loop with the same batch again and again. Everything else: loop, callbacks, "
        "logging, loader.",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
