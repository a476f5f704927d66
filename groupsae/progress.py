"""How far a pass over tokens is: a bar on a terminal, a line every half minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SILENCE = 30.0  # seconds between lines where no bar can move


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
    began = said = time.monotonic()
    with Progress(*columns, transient=True, disable=not show) as progress:
        task = progress.add_task("", total=total, rate="")

        def advance(tokens: int) -> None:
            nonlocal said
            now = time.monotonic()
            progress.advance(task, tokens)
            done = progress.tasks[task].completed
            rate = done / max(now - began, 1e-9)
            progress.update(task, rate=f"{rate:,.0f} tokens/s")
            if show and now - said > SILENCE and not sys.stdout.isatty():
                said = now
                left = timedelta(seconds=round((total - done) / rate))
                print(
                    f"{title}: {done / total:.0%}, {rate:,.0f} tokens/s, {left} left", flush=True
                )

        yield advance
