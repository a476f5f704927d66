"""A long run with its memory watched: `python -m benchmarks.soak [minutes=10] [device=cuda]`.

`size=smallest` takes seconds.

Trains a random model of Pythia-160M's shape with the paper's sizes (the bundled one on a CPU) for
so many minutes, notes the memory every ten seconds, and fits a line through the second half: a
leak shows as a slope. Writes benchmarks/results/soak.md.
"""

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import psutil
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from benchmarks.loop import BUNDLED, ON_RANDOM, SHAPES, VOCAB, Shape
from benchmarks.timing import options, random_model, smallest, write
from groupsae.app.fit import build
from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import CONF
from groupsae.runtime.quiet import quiet

EVERY = 10.0  # seconds between looks
FIRST = 0.5  # share of the time in which caches may still fill


class Watch(L.Callback):
    """Notes seconds, tokens and memory, and ends the run when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.rows = seconds, []
        self.every = 0.0 if smallest() else EVERY
        self.process = psutil.Process()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.began = self.looked = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        """Look at the memory now and then."""
        now = time.perf_counter()
        if now - self.looked < self.every:
            return
        self.looked = now
        gpu = pl_module.device.type == "cuda"
        self.rows.append(
            (
                now - self.began,
                trainer.global_step,
                self.process.memory_info().rss / 1e6,
                torch.cuda.memory_allocated() / 1e6 if gpu else 0.0,
                torch.cuda.max_memory_allocated() / 1e6 if gpu else 0.0,
                torch.cuda.memory_reserved() / 1e6 if gpu else 0.0,
            )
        )
        if now - self.began > self.seconds:
            trainer.should_stop = True


def main() -> None:
    """Run and write what was seen."""
    given = options(sys.argv[1:], minutes=("10", r"\d+(\.\d+)?"), device=("cpu", "cpu|cuda"))
    seconds, gpu = 60 * float(given["minutes"]), given["device"] == "cuda"
    tiny = []
    if smallest():
        seconds, tiny = 5.0, ["stream.context=64", "stream.blocks_per_step=4", "sae.expansion=2"]
    quiet()
    register_resolver()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        chosen = [f"model={BUNDLED}"]
        if gpu:
            *sizes, own = SHAPES["pythia-160m"]
            size = dict(zip(Shape._fields, sizes, strict=False))
            model = stack.enter_context(random_model(**size, vocab_size=VOCAB))
            chosen = [
                *ON_RANDOM, *own, f"model.name={model}", "trainer=ddp", "trainer.accelerator=gpu",
                "trainer.devices=1", "model.dtype=bfloat16", "sae.selection=bfloat16",
            ]  # fmt: skip
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            cfg = compose("train", [
                f"output={folder}/out", *chosen, "tokens=100_000_000_000",
                "stream.max_tokens=1_000_000", "calibration.tokens=100_000",
                "stream.heldout_tokens=65_536", "eval_every=200", "checkpoint_every=200",
                "logger=none", "+trainer.enable_progress_bar=false", *tiny,
            ])  # fmt: skip
        run = build(cfg, Path(folder) / "run", Console())
        watch = Watch(seconds)
        run.trainer.callbacks.append(watch)
        run.trainer.fit(run.suite, datamodule=run.data)
    rows = np.array(watch.rows)
    late = rows[rows[:, 0] > FIRST * seconds]
    slopes = [60 * np.polyfit(late[:, 0], late[:, i], 1)[0] for i in (2, 3, 5)]
    steps = rows[-1, 1]
    lines = [
        f"{rows[-1, 0] / 60:.1f} minutes, {steps:,.0f} steps of {run.data.tokens_per_step:,} "
        f"tokens ({steps * run.data.tokens_per_step / rows[-1, 0]:,.0f} tokens/s), "
        f"{len(run.suite.members())} SAEs, a validation and a checkpoint every 200 steps.",
        "",
        "| seconds | step | resident MB | GPU allocated MB | its peak MB | GPU reserved MB |",
        "|---|---|---|---|---|---|",
        *(
            "| " + " | ".join(f"{value:,.0f}" for value in row) + " |"
            for row in rows[:: max(1, len(rows) // 12)]
        ),
        "",
        "Slope over the second half, MB a minute: resident "
        f"{slopes[0]:+.2f}, GPU allocated {slopes[1]:+.2f}, GPU reserved {slopes[2]:+.2f}.",
    ]
    write("soak", "A long run's memory", "\n".join(lines), torch.device(given["device"]))


if __name__ == "__main__":
    main()
