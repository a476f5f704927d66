"""How a process learns that it has to stop: SIGINT, SIGTERM, and SIGUSR2 under submitit."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ECHO = 2.0  # seconds in which a second signal counts as the first one sent again

Handler = Callable[[int, FrameType | None], None]


class Stopped(BaseException):
    """A signal arrived where nothing has to be saved; only the command catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def handled_by(handler: Handler, *, requeue: bool = True) -> Iterator[None]:
    """Let a function handle the signals to stop; does nothing outside the main thread.

    Args:
        handler: called with every signal.
        requeue: also handle SIGUSR2, if submitit waits for it. submitit sends it before
            the allotted time ends, and queues the job again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if requeue and callable(signal.getsignal(signal.SIGUSR2)):
        numbers.append(signal.SIGUSR2)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def first_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Call a function with the number of the first signal to stop; a second ends the process.

    A second one within two seconds is ignored: `timeout`, a terminal or SLURM may send to a group
    of processes what one of them passes on to the others.
    """
    received: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if not received:
            received.append(time.monotonic())
            act(number)
        elif time.monotonic() - received[0] > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    with handled_by(handle):
        yield


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """End the block at the first signal to stop.

    Raises:
        Stopped: a signal arrived.
    """

    def stop(number: int) -> None:
        raise Stopped(number)

    with first_signal(stop):
        yield
