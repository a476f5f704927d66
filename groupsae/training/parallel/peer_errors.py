"""What is said when another process of the run no longer answers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import torch

from groupsae.runtime.errors import UserError

# what gloo writes; it raises RuntimeError itself
SIGNS = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe",
    "timed out waiting", "timeout", "connectfullmesh failed", "socket", "gloo",
)  # fmt: skip


@contextmanager
def told_of_lost(folder: Path) -> Iterator[None]:
    """Turn the error of a collective into a sentence that says how to go on.

    Args:
        folder: of the run.

    Raises:
        UserError: another process has ended, or has not answered in time.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise UserError(
            "another process of this run was lost, or did not answer in time "
            f"({_short(error)}). What it says itself is above or in its own "
            "log. Start all processes again; the run goes on from its last checkpoint:\n"
            f"  python -m groupsae.train {quote(f'resume={folder}')}"
        ) from error


def is_lost(error: RuntimeError) -> bool:
    """Return whether an error is that of a collective whose other side is gone."""
    if isinstance(error, torch.distributed.DistError):  # of NCCL, and while processes meet
        return True
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return False
    said = str(error).lower()
    return type(error) is RuntimeError and any(sign in said for sign in SIGNS)


def _short(error: RuntimeError) -> str:
    """Return the part of an error that is not of places in the source and of causes guessed."""
    first = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0])
    return first.partition(" This is typically")[0].rstrip(".")
