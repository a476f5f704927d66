"""A checkpoint that several processes write: each the SAEs that it holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groupsae.files.atomic import explain_write_errors
from groupsae.runtime.errors import UserError
from groupsae.training.checkpoints.folder import (
    Record,
    begin,
    clear,
    partial_of,
    seal,
)
from groupsae.training.checkpoints.parts import take_apart, write_parts, write_rest
from groupsae.training.parallel.collect import gather, gather_named, leads


def save_together(checkpoint: dict[str, Any], path: Path) -> None:
    """Write this process's SAEs, and in the first process everything else.

    Every process calls this. The folder counts when all have written, so it is whole or not there.

    Raises:
        UserError: one of the processes could not write; said in all of them.
    """
    first = leads()
    if gather(first and path.exists())[0]:
        return
    rest, parts = take_apart(checkpoint)
    partial = partial_of(path)
    records: dict[str, Record] = {}
    with _all_or_none(path):
        if first:
            begin(path)
    with _all_or_none(path):
        records = write_parts(partial, parts) | (write_rest(partial, rest) if first else {})
    every = gather_named(records)
    with _all_or_none(path):
        if first:
            seal(path, every)


def same_checkpoint(checkpoint: Path | None, folder: Path) -> None:
    """Check that all processes of the run go on from a checkpoint, or none does.

    Raises:
        UserError: one sees a checkpoint that another does not see; said in all of them.
    """
    seen = gather(checkpoint is not None)
    if len(set(seen)) > 1:
        raise UserError(
            f"process {seen.index(False)} of this run does not see the checkpoints in {folder}, "
            f"which process {seen.index(True)} sees: all need the same folder. Name one that all "
            "machines share with output=<folder>, or copy this one to where it is missing."
        )


@contextmanager
def _all_or_none(path: Path) -> Iterator[None]:
    """Do something in all processes; if it fails in one, stop in all with the same sentence.

    Nothing is removed before all have stopped: else one would lose what it is writing into, and
    say that instead of the cause.
    """
    problem = ""
    try:
        with explain_write_errors(path):
            yield
    except UserError as error:
        problem = str(error)
    problem = next(filter(None, gather(problem)), "")  # here they wait for each other
    if problem:
        if leads():
            clear(path)
        raise UserError(problem)
