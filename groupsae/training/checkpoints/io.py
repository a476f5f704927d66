"""Saves and loads a suite's checkpoints for Lightning, the same in all processes of a run."""

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError

from groupsae.files.atomic import explain_write_errors
from groupsae.runtime.errors import UserError
from groupsae.training.checkpoints.folder import (
    Damaged,
    Record,
    begin,
    checkpoints,
    partial_of,
    read,
    remove,
    seal,
    take_apart,
    write,
)
from groupsae.training.parallel.collect import gather, leads


class SuiteCheckpoints(CheckpointIO):
    """Saves a suite as a folder with one file per SAE; loads the newest that is not damaged.

    No file depends on the number of processes, so a run resumes with any number of them.

    Args:
        say: prints a message to the user.
    """

    def __init__(self, *, say: Callable[[str], object]) -> None:
        self.say = say

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint of all SAEs, in one process; see `save_together`."""
        save_together(checkpoint, Path(path), lambda value: [value])

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = None,
        weights_only: bool | None = None,
        members: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Return the checkpoint at `path`, or the last one before it that is not damaged.

        Every process of a run calls this, and all of them take the same one, of those that the
        first process sees. Damaged ones are renamed, with a message. Everything is loaded to the
        CPU, and nothing that could run code is ever read. `members` are the numbers in the plan
        of the SAEs to read; None reads all.

        Raises:
            UserError: all are damaged; the newest undamaged one lacks an SAE; or one of the
                processes cannot read it at the moment, so it may well be complete.
        """
        path = Path(path)
        existing = checkpoints(path.parent)
        candidates = existing[existing.index(path) :] if path in existing else [path]
        for candidate in gather(candidates)[0]:
            found, damage, refusal = self._try(candidate, members)
            damages, refusals = zip(*gather((damage, refusal)), strict=True)
            if any(damages):
                if leads():
                    self._set_aside(candidate, next(filter(None, damages)))
            elif any(refusals):
                raise UserError(next(filter(None, refusals)))
            else:
                self.say(f"resuming from {candidate}")
                return found
        raise UserError(
            f"every checkpoint in {path.parent} is damaged; they are now called *.damaged. If the "
            "disk was at fault and reads them again, give one its name back (step=<n>.ckpt) and "
            "the same command resumes from it. overwrite=true removes them and starts again."
        )

    def _try(self, path: Path, members: Sequence[int] | None) -> tuple[dict[str, Any], str, str]:
        """Return the checkpoint, or its damage, or the reason why it cannot be used now."""
        try:
            return read(path, members), "", ""
        except (Damaged, SafetensorError) as error:
            return {}, str(error), ""
        except UserError as error:
            return {}, "", str(error)
        except OSError as error:
            # another process may find the file that this one does not: only the first one, which
            # listed the checkpoints, knows that a file is missing
            if error.errno == errno.EIO or (error.errno == errno.ENOENT and leads()):
                return {}, str(error), ""
            refusal = (
                f"cannot read the checkpoint {path}: {error.strerror or error}. It was not "
                "changed: fix that, and the same command resumes from it; or move it away, to "
                "resume from the previous one."
            )
            return {}, "", refusal

    def _set_aside(self, path: Path, damage: str) -> None:
        """Rename a damaged checkpoint, so that it is no longer read, and print a message."""
        aside = path.with_suffix(".damaged")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        self.say(
            f"{path} is damaged ({damage}): it is now called {aside.name}, and the checkpoint "
            "before it is used, if one exists."
        )

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        remove(Path(path))


def save_together(
    checkpoint: dict[str, Any], path: Path, gather: Callable[[Any], list[Any]] = gather
) -> None:
    """Write this process's SAEs, and in the first process everything else.

    Every process that holds SAEs calls this. The checkpoint counts once all have written, so it
    is complete or absent. If one of that step exists nothing is written: it would be the same.
    `gather` returns the value of each process that calls this.

    Raises:
        UserError: one of the processes could not write; the same in all of them.
    """
    first = leads()
    if gather(first and path.exists())[0]:
        return
    rest, parts = take_apart(checkpoint)
    records: dict[str, Record] = {}
    with _in_all_or_none(path, gather):
        if first:
            begin(path)
    with _in_all_or_none(path, gather):
        records = write(path, parts, rest if first else None)
    every = gather(records)
    with _in_all_or_none(path, gather):
        if first:
            seal(path, {name: record for each in every for name, record in each.items()})


@contextmanager
def _in_all_or_none(path: Path, gather: Callable[[Any], list[Any]]) -> Iterator[None]:
    """Do something in all processes; if it fails in one, fail in all with the same sentence.

    The folder is removed once all have failed: a process that still writes into it would report
    that in place of the cause.
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
            shutil.rmtree(partial_of(path), ignore_errors=True)
        raise UserError(problem)


def check_same_checkpoint(checkpoint: Path | None, folder: Path) -> None:
    """Check that all processes of the run resume from a checkpoint, or none does.

    Raises:
        UserError: one sees a checkpoint that another does not see; in all of them.
    """
    seen = gather(checkpoint is not None)
    if len(set(seen)) > 1:
        raise UserError(
            f"process {seen.index(False)} of this run does not see the checkpoints in {folder}, "
            f"which process {seen.index(True)} sees: all need the same folder. Name one that all "
            "machines share with output=<folder>, or copy this one to where it is missing."
        )
