"""Tokens seen, tokens per second and time left."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from groupsae.cost.stopwatch import Stopwatch
from groupsae.runtime.progress import ProgressLines
from groupsae.training.metrics import is_logging_step

CLOCKS = ("saes", "validation", "all")


class Throughput(L.Callback):
    """Logs `tokens_seen` and `time/tokens_per_sec` at every logging step.

    The rate is wall clock between logging steps over all processes, evaluation and checkpoints
    included: it is what the user waits for. It never waits for the device itself. Where the
    output is no terminal, and so no progress bar moves, a line is printed every half minute.

    Attributes:
        total_seconds: seconds of all training steps.
        total_tokens: tokens of all training steps, over all processes.
        saes: clock of the SAEs' steps.
        validation: clock of the validations during training.
        all: clock of the complete fit.
    """

    def __init__(self) -> None:
        self.total_seconds, self.total_tokens = 0.0, 0
        self.logged = (0.0, 0)  # the totals when last logged
        self.saes, self.validation, self.all = Stopwatch(), Stopwatch(), Stopwatch()

    def state_dict(self) -> dict[str, float]:
        """Return the totals, so that a resumed run continues to count."""
        clocks = {name: getattr(self, name).seconds for name in CLOCKS}
        return {"seconds": self.total_seconds, "tokens": self.total_tokens, **clocks}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the totals."""
        self.logged = self.total_seconds, self.total_tokens = (
            state_dict["seconds"],
            int(state_dict["tokens"]),
        )
        for name in CLOCKS:
            getattr(self, name).seconds = state_dict[name]

    def overall(self) -> float:
        """Return tokens per second since the start."""
        return self.total_tokens / self.total_seconds if self.total_seconds else float("nan")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of everything."""
        self.all.start()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop it."""
        self.all.stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the rate."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        step = data.tokens_per_step
        self._lines = ProgressLines("training", data.num_steps * step, trainer.global_step * step)
        self._last = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Start the clock of the SAEs: the batch comes with its activations made."""
        self.saes.start(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Log the rate since the last logging step."""
        self.saes.stop()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.total_seconds += seconds
        self.total_tokens += data.tokens_per_step
        if is_logging_step(pl_module):
            seconds, tokens = self.logged
            rate = (self.total_tokens - tokens) / (self.total_seconds - seconds)
            seen = float(data.blocks_seen * data.packing.context)
            pl_module.log("time/tokens_per_sec", rate, rank_zero_only=True)
            pl_module.log("tokens_seen", seen, rank_zero_only=True)
            pl_module.shown["tok/s"] = rate
            self.logged = self.total_seconds, self.total_tokens
        if trainer.is_global_zero:
            done = trainer.global_step * data.tokens_per_step
            self._lines.update(done, f"step {trainer.global_step}/{data.num_steps}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the validations during training."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.validation.start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop it."""
        self.validation.stop()
