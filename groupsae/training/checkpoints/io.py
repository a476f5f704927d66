"""Lightning's seam for checkpoints: where and how a suite is saved and read back."""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError

from groupsae.files.atomic import explain_write_errors
from groupsae.runtime.errors import UserError
from groupsae.training.checkpoints.folder import (
    Damaged,
    begin,
    checkpoints,
    clear,
    manifest_of,
    remove,
    seal,
    set_aside,
    verify,
)
from groupsae.training.checkpoints.parts import (
    STATE,
    file_of,
    index_of,
    put_together,
    read_parts,
    read_rest,
    take_apart,
    write_parts,
    write_rest,
)
from groupsae.training.parallel.collect import gather, leads


class SuiteCheckpoints(CheckpointIO):
    """Saves a suite as a folder with one file per SAE; reads back the newest that is whole.

    No file says how many processes there were, so a run goes on with any number of them.

    Args:
        say: prints a sentence to the user.
    """

    def __init__(self, *, say: Callable[[str], object]) -> None:
        self.say = say

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, unless one of that step is there: it would be the same.

        Raises:
            UserError: it cannot be written; checkpoints before it stay as they are.
        """
        path = Path(path)
        if path.exists():
            return
        rest, parts = take_apart(checkpoint)
        try:
            with explain_write_errors(path):
                partial = begin(path)
                seal(path, write_parts(partial, parts) | write_rest(partial, rest))
        except UserError:
            clear(path)
            raise

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = None,
        weights_only: bool | None = None,
        members: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Return the checkpoint at `path`, or the last one before it that is whole.

        Every process of a run calls this, and all of them take the same one, of those that the
        first process sees. What is damaged is set aside, and said.

        Args:
            path: of the newest checkpoint.
            map_location: not used: everything comes on the CPU.
            weights_only: not used: nothing that could run code is read, whatever it says.
            members: numbers in the plan of the SAEs to read; None reads all.

        Raises:
            UserError: none is whole; the newest that is lacks an SAE; or one cannot be read just
                now in one of the processes, which says nothing about what is in it.
        """
        path = Path(path)
        there = checkpoints(path.parent)
        mine = there[there.index(path) :] if path in there else [path]
        for candidate in gather(mine)[0]:
            found, damage, refusal = self._read(candidate, members)
            damages, refusals = zip(*gather((damage, refusal)), strict=True)
            if any(damages):
                self._set_aside(candidate, next(filter(None, damages)))
            elif any(refusals):
                raise UserError(next(filter(None, refusals)))
            else:
                self.say(f"going on from {candidate}")
                return found
        raise UserError(
            f"no checkpoint in {path.parent} is whole: they are called *.damaged now. If the disk "
            "was at fault and reads them again, give one its name back (step=<n>.ckpt) and the "
            "same command goes on from there. overwrite=true removes them and starts again."
        )

    def _read(self, path: Path, members: Sequence[int] | None) -> tuple[dict[str, Any], str, str]:
        """Return the checkpoint, or what is damaged in it, or why it is not to be read."""
        try:
            records = manifest_of(path)
            every = [index_of(name) for name in records if name != STATE]
            wanted = every if members is None else members
            if set(wanted) - set(every):
                asked = (
                    f"{path} holds {len(every)} SAEs, but groups.json now asks for others: bring "
                    "back the groups.json that it was written with, or start the run again with "
                    "overwrite=true."
                )
                return {}, "", asked
            verify(path, [STATE, *map(file_of, wanted)], records)
            return put_together(read_rest(path), read_parts(path, wanted)), "", ""
        except (Damaged, SafetensorError) as error:
            return {}, str(error), ""
        except OSError as error:
            # what one process does not find another may have: only who listed them can tell
            if error.errno == errno.EIO or (error.errno == errno.ENOENT and leads()):
                return {}, str(error), ""
            asked = (
                f"cannot read the checkpoint {path}: {error.strerror or error}. It was left as it "
                "is: mend that, and the same command goes on from it; or move it away, and it "
                "goes on from the one before."
            )
            return {}, "", asked

    def _set_aside(self, path: Path, damage: str) -> None:
        """Rename a damaged checkpoint, in the first process, and say so."""
        problem = ""
        if leads():
            try:
                aside = set_aside(path)
                self.say(
                    f"{path} is damaged ({damage}): it is now called {aside.name}, and the "
                    "checkpoint before it, if there is one, is used."
                )
            except OSError as error:
                problem = (
                    f"{path} is damaged ({damage}) and cannot be renamed: "
                    f"{error.strerror or error}. Move it away, and the same command goes on from "
                    "the checkpoint before it."
                )
        if problem := gather(problem)[0]:
            raise UserError(problem)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        remove(Path(path))
