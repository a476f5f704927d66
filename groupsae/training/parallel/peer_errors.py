"""Explains the error of a collective when another process of the run no longer answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError
from groupsae.training.parallel.collect import num_processes

# in messages of gloo, which raises RuntimeError
SIGNS = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe",
    "timed out waiting", "timeout", "connectfullmesh failed", "socket", "gloo",
)  # fmt: skip


@contextmanager
def explain_lost_process(folder: Path) -> Iterator[None]:
    """Turn the error of a collective into a message that explains how to resume.

    Raises:
        UserError: another process has ended, or has not answered in time.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"another process of this run was lost, or did not answer in time ({reason}). Its own "
            "error is above, or in its own log. Start all processes again; the run resumes from "
            f"its last checkpoint:\n  {command('train', resume=folder)}"
        ) from error


def is_lost_process(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process ended."""
    if isinstance(error, torch.distributed.DistError):  # of NCCL, and while processes meet
        return True
    message = str(error).lower()
    return (
        num_processes() > 1
        and type(error) is RuntimeError
        and any(sign in message for sign in SIGNS)
    )
