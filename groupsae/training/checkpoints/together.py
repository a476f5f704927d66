"""A checkpoint that several processes write: each the SAEs that it holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from groupsae.errors import UserError
from groupsae.training.checkpoints.folder import Record, begin, explained, partial_of, seal
from groupsae.training.checkpoints.io import first_said
from groupsae.training.checkpoints.parts import take_apart, write_parts, write_rest


def save_together(checkpoint: dict[str, Any], path: Path) -> None:
    """Write this process's SAEs, and in the first process everything else.

    Every process calls this. The folder counts when all have written, so it is whole or not there.

    Raises:
        UserError: one of the processes could not write; said in all of them.
    """
    leads = torch.distributed.get_rank() == 0
    if _one_says(path.exists() if leads else None):
        return
    rest, parts = take_apart(checkpoint)
    partial, records = partial_of(path), {}
    with _all_or_none(path):
        if leads:
            begin(path)
    with _all_or_none(path):
        records = write_parts(partial, parts) | (write_rest(partial, rest) if leads else {})
    every: list[dict[str, Record]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, records)
    with _all_or_none(path):
        if leads:
            seal(path, {name: found for each in every for name, found in each.items()})


@contextmanager
def _all_or_none(path: Path) -> Iterator[None]:
    """Do something in all processes; if it fails in one, stop in all with the same sentence."""
    problem = ""
    try:
        with explained(path):
            yield
    except UserError as error:
        problem = str(error)
    problem = first_said(problem)  # here they wait for each other
    if problem:
        raise UserError(problem)


def _one_says(answer: bool | None) -> bool:
    """Return what the first process answers."""
    said: list[Any] = [answer]
    torch.distributed.broadcast_object_list(said)
    return bool(said[0])
