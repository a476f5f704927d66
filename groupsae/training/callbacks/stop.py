"""Turns a signal to stop into a checkpoint at the end of the step and an orderly end."""

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch

from groupsae.runtime.compat import skip_next_validation
from groupsae.runtime.signals import first_signal
from groupsae.training.parallel.collect import gather
from groupsae.training.readback import Readback


class StopOnSignal(L.Callback):
    """Saves and stops after the first SIGINT or SIGTERM; a second one ends the process.

    With several processes all of them stop at the same step, whichever got the signal: one step
    later, so that no step waits for the others' answers.

    Args:
        folder: folder for the checkpoint.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)
        self.received: int | None = None
        self._signals = ExitStack()
        self._stopping: Readback | None = None  # processes with a signal, after the last step

    def receive(self, number: int) -> None:
        """Note a signal."""
        self.received = number

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over from `stopped_by_signals`."""
        self._signals.enter_context(first_signal(self.receive))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save and stop if a signal arrived."""
        stop = self.received is not None
        if trainer.world_size > 1:
            before, self._stopping = self._stopping, self._count(trainer, stop)
            stop = before is not None and before.read()[0] > 0
        if stop and not trainer.should_stop:
            self.received = self.received or signal.SIGTERM
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")
            trainer.should_stop = True
            if trainer.global_step % int(trainer.val_check_batch or 1):
                # no validation is due: there may be no time for one
                skip_next_validation(trainer)

    def _count(self, trainer: L.Trainer, stop: bool) -> Readback:
        count = torch.zeros(1, dtype=torch.int64, device=trainer.strategy.root_device)
        count.fill_(stop)
        torch.distributed.all_reduce(count)
        return Readback(count)

    def received_anywhere(self) -> int | None:
        """Return the signal that this or another process got in training.

        Every process calls it: a signal in the last step is not known to the others yet.
        """
        every = gather(self.received)
        return self.received or next(filter(None, every), None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Return the signals."""
        self._signals.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, _: Any) -> None:
        """Return the signals."""
        self._signals.close()
