"""Stop in order on SIGINT or SIGTERM: in training at the end of the step, with a checkpoint."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch

from groupsae.training.parallel.collect import of_each
from groupsae.training.readback import Readback

SAME = 2.0  # seconds in which a second signal is the first one's echo


class Stopped(BaseException):
    """A signal came where there is nothing to save; not to be caught on the way."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end what is done inside, and a second one the process.

    Raises:
        Stopped: one came.
    """
    since: list[float] = []

    def end(number: int, _frame: FrameType | None) -> None:
        if not since:
            since.append(time.monotonic())
            raise Stopped(number)
        if time.monotonic() - since[0] > SAME:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, end) for number in _numbers()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_us(trainer: L.Trainer) -> None:
    """Keep Lightning's own answer to signals out.

    On SIGTERM it leaves without a checkpoint and as if all were well, by a collective within the
    signal's handler; with several processes it asks before every step whether one came, for which
    the host waits; and under SLURM it saves, on SIGUSR1, in the middle of a step.
    """
    private: Any = trainer
    private._signal_connector.register_signal_handlers = lambda: None
    private.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def _numbers() -> list[int]:
    """Return the signals that tell this process to stop; none but in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    # submitit's, before the end of the allotted time: it asks for the job to come again
    requeue = [signal.SIGUSR2] if callable(signal.getsignal(signal.SIGUSR2)) else []
    return [signal.SIGINT, signal.SIGTERM, *requeue]


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
        """Take the signals over, from `stopped_by_signals`."""
        for number in _numbers():
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
            if trainer.global_step % int(trainer.val_check_batch or 1):
                # none is due, but Lightning would validate before it ends: there may be no time
                trainer.fit_loop.epoch_loop._skip_next_val = True

    def _tell(self, trainer: L.Trainer, stop: bool) -> Readback:
        told = torch.zeros(1, dtype=torch.int64, device=trainer.strategy.root_device)
        told.fill_(stop)
        torch.distributed.all_reduce(told)
        return Readback(told)

    def told(self) -> int | None:
        """Return the signal that this or another process got in training; every process calls it.

        In its last step none hears of the others' signals any more.
        """
        every = of_each(self.received)
        return self.received or next(filter(None, every), None)

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
