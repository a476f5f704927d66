"""Seconds of wall clock, or of the GPU's own clock where one does the work."""

import time

import torch

Mark = float | torch.cuda.Event


class Stopwatch:
    """The sum of the seconds inside `with stopwatch:`, or between `start` and `stop`.

    On a GPU the marks are events in its stream that are read later: measuring does not wait for
    the device, whose work counts where it was queued.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._open: Mark | None = None
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, device: torch.device | None = None) -> None:
        """Start; `device` does the work (None: this process)."""
        if device is not None and device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._open = event
        else:
            self._open = time.perf_counter()

    def stop(self) -> None:
        """Stop; does nothing without a start."""
        if isinstance(self._open, float):
            self._seconds += time.perf_counter() - self._open
        elif self._open is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._pending.append((self._open, event))
            if len(self._pending) > 1000:  # old pairs are long finished: no wait
                self._read(500)
        self._open = None

    def __enter__(self) -> "Stopwatch":
        """Start the wall clock."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    @property
    def seconds(self) -> float:
        """Return the sum so far; on a GPU waits for the last mark."""
        self._read(len(self._pending))
        running = time.perf_counter() - self._open if isinstance(self._open, float) else 0.0
        return self._seconds + running

    @seconds.setter
    def seconds(self, value: float) -> None:
        """Continue from a stored sum."""
        self._seconds, self._pending = value, []

    def _read(self, count: int) -> None:
        for begin, end in self._pending[:count]:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        del self._pending[:count]
