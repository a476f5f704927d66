"""Progress of a pass over tokens: a bar on a terminal, a line every half minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import IO

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from groupsae.runtime.output import screen
from groupsae.runtime.units import format_seconds

SILENCE = 30.0  # seconds between lines where no bar can move


class ProgressLines:
    """A line every half minute, for output that is no terminal: a log file, SLURM."""

    def __init__(
        self, title: str, total: int | None, done: int = 0, stream: IO[str] | None = None
    ) -> None:
        self.title, self.total, self.before, self.stream = title, total, done, stream
        self.began = self.printed = time.monotonic()

    def rate(self, done: float) -> float:
        """Return the tokens per second since the start."""
        return (done - self.before) / max(time.monotonic() - self.began, 1e-3)

    def update(self, done: int, where: str | None = None) -> None:
        """Print a line, unless one was printed a short time ago or a bar moves instead.

        Args:
            done: tokens.
            where: the beginning of the line; None for the title and the share that is done.
        """
        now, stream = time.monotonic(), self.stream or sys.stdout
        if now - self.printed <= SILENCE or stream.isatty():
            return
        self.printed = now
        rate, share, left = self.rate(done), f"{done:,} tokens", ""
        if self.total is not None:
            share = f"{done / self.total:.0%}"
            left = f", {format_seconds((self.total - done) / max(rate, 1e-9))} left"
        where = where or f"{self.title}: {share}"
        print(f"{where}, {rate:,.0f} tokens/s{left}", file=stream, flush=True)


@contextmanager
def token_progress(
    title: str, total: int | None, show: bool = True, *, done: int = 0, stderr: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the tokens of each part that is done.

    `total` is None if unknown; `done` are the tokens of an earlier start.
    """
    rate = TextColumn("{task.fields[rate]}")
    # the title is no format of `task`: it may hold braces
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), rate, TimeRemainingColumn())
    lines = ProgressLines(title, total, done, sys.stderr if stderr else None)
    console = screen(stderr=stderr)
    still = console.is_jupyter and find_spec("ipywidgets") is None  # no bar can move
    with Progress(
        *columns, console=console, transient=True, disable=still or not show
    ) as progress:
        task = progress.add_task(title, total=total, completed=done, rate="")

        def advance(tokens: int) -> None:
            progress.advance(task, tokens)
            done = progress.tasks[task].completed
            progress.update(task, rate=f"{lines.rate(done):,.0f} tokens/s")
            if show:
                lines.update(round(done))

        yield advance
