"""Lightning's seam for checkpoints: where and how a suite is saved and read back."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError

from groupsae.errors import UserError
from groupsae.training.checkpoints.folder import (
    Damaged,
    begin,
    checkpoints,
    clear,
    explained,
    manifest_of,
    remove,
    seal,
    set_aside,
    verify,
)
from groupsae.training.checkpoints.parts import (
    STATE,
    file_of,
    put_together,
    read_parts,
    read_rest,
    take_apart,
    write_parts,
    write_rest,
)
from groupsae.training.parallel.collect import of_each


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
            with explained(path):
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
            UserError: none is whole, or the newest that is lacks an SAE.
        """
        path = Path(path)
        there = checkpoints(path.parent)
        mine = there[there.index(path) :] if path in there else [path]
        for candidate in of_each(mine)[0]:
            found, damage, lacking = self._read(candidate, members)
            damages, lackings = zip(*of_each((damage, lacking)), strict=True)
            if any(lackings):
                raise UserError(next(filter(None, lackings)))
            if not any(damages):
                self.say(f"going on from {candidate}")
                return found
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                aside = set_aside(candidate)
                self.say(
                    f"{candidate} is damaged ({next(filter(None, damages))}): it is now called "
                    f"{aside.name}, and the checkpoint before it is used."
                )
        raise UserError(
            f"no checkpoint in {path.parent} is whole. overwrite=true starts the run again."
        )

    def _read(self, path: Path, members: Sequence[int] | None) -> tuple[dict[str, Any], str, str]:
        """Return the checkpoint, what is damaged in it, and which SAE it lacks; or nothing."""
        try:
            records = manifest_of(path)
            every = [int(n.split("-")[1].split(".")[0]) for n in records if n != STATE]
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
        except (Damaged, OSError, SafetensorError) as error:
            return {}, str(error) or type(error).__name__, ""

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        remove(Path(path))
