"""The screen: nothing of the user's is markup, and nothing that cannot be printed ends a run."""

import io
import os
import sys
from typing import IO, Any

from rich.console import Console


def screen(*, stderr: bool = False, quiet: bool = False, file: IO[str] | None = None) -> Console:
    """Return a console that prints text as it is: brackets and colons in names have no meaning."""
    return Console(markup=False, emoji=False, stderr=stderr, quiet=quiet, file=file)


class _Forgiving(io.FileIO):
    """A file descriptor that drops what it cannot write: a closed pipe, a full disk."""

    def write(self, data: Any, /) -> int:
        """Write bytes, or drop them."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def never_fail_to_print() -> None:
    """Let this process print to any terminal, pipe or file, or to none, without an error.

    Characters that the output's encoding lacks are replaced. Output after the reader has left
    (`| head`), or with stdout closed, is dropped.
    """
    for name in ("stdout", "stderr"):
        stream, first = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is first and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            printer = io.TextIOWrapper(
                io.BufferedWriter(_Forgiving(stream.fileno(), "w", closefd=False)),
                encoding=stream.encoding,
                errors="replace" if name == "stdout" else stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, printer)
