"""Stop at the end of the step on SIGINT or SIGTERM, with a checkpoint."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch

from groupsae.training.readback import Readback

SAME = 2.0  # seconds in which a second signal is the first one's echo


class StopOnSignal(L.Callback):
    """Turns the first SIGINT or SIGTERM into a checkpoint and an orderly end.

    A second one ends the process at once, unless it comes with the first: `timeout`, a terminal
    or SLURM may tell a whole group of processes what one of them passes on to the others. With
    several processes all of them stop at the same step, whichever was told: the one after, so
    that no step waits for the others' answers.

    Args:
        folder: where the checkpoint goes.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._told: Readback | None = None  # how many processes were, after the last step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over (from Lightning, which would leave without a checkpoint)."""
        if threading.current_thread() is threading.main_thread():
            # submitit's, before the end of the allotted time: it asks for the job to come again
            requeue = [signal.SIGUSR2] if callable(signal.getsignal(signal.SIGUSR2)) else []
            for number in (signal.SIGINT, signal.SIGTERM, *requeue):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._since < SAME:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received, self._since = number, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save and stop if told to."""
        stop = self.received is not None
        if trainer.world_size > 1:
            before, self._told = self._told, self._tell(trainer, stop)
            stop = before is not None and before.read()[0] > 0
        if stop and not trainer.should_stop:
            self.received = self.received or signal.SIGTERM
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")
            trainer.should_stop = True

    def _tell(self, trainer: L.Trainer, stop: bool) -> Readback:
        told = torch.zeros(1, dtype=torch.int64, device=trainer.strategy.root_device)
        told.fill_(stop)
        torch.distributed.all_reduce(told)
        return Readback(told)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back, before Lightning gives its own back."""
        self._give_back()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
