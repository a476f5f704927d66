"""How far a pass over tokens is: a bar on a terminal, a line every half minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SILENCE = 30.0  # seconds between lines where no bar can move


class Lines:
    """A line every half minute, for output that is no terminal: a log file, SLURM.

    Args:
        title: what is going on.
        total: tokens of the whole of it; None if nobody knows.
        done: of them when this began.
        stream: where the bar would be; None for stdout.
    """

    def __init__(
        self, title: str, total: int | None, done: int = 0, stream: IO[str] | None = None
    ) -> None:
        self.title, self.total, self.before, self.stream = title, total, done, stream
        self.began = self.said = time.monotonic()

    def rate(self, done: float) -> float:
        """Return the tokens per second since this began."""
        return (done - self.before) / max(time.monotonic() - self.began, 1e-3)

    def tell(self, done: int, where: str | None = None) -> None:
        """Say how far it is, unless a line came a short time ago or a bar moves instead.

        Args:
            done: tokens.
            where: what the line begins with; None for the title and the share of the whole.
        """
        now, stream = time.monotonic(), self.stream or sys.stdout
        if now - self.said <= SILENCE or stream.isatty():
            return
        self.said = now
        rate = self.rate(done)
        how_far, left = f"{done:,} tokens", ""
        if self.total is not None:
            how_far = f"{done / self.total:.0%}"
            seconds = round((self.total - done) / max(rate, 1e-9))
            left = f", {timedelta(seconds=seconds)} left"
        where = where or f"{self.title}: {how_far}"
        print(f"{where}, {rate:,.0f} tokens/s{left}", file=stream, flush=True)


@contextmanager
def token_progress(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that is told the tokens of each part when it is done.

    Args:
        title: what is going on.
        total: tokens of the whole pass.
        show: whether to show anything; one process of several does.
    """
    columns = (
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    lines = Lines(title, total)
    with Progress(*columns, transient=True, disable=not show) as progress:
        task = progress.add_task("", total=total, rate="")

        def advance(tokens: int) -> None:
            progress.advance(task, tokens)
            done = progress.tasks[task].completed
            progress.update(task, rate=f"{lines.rate(done):,.0f} tokens/s")
            if show:
                lines.tell(round(done))

        yield advance
