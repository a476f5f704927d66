"""The part of a data module that fills a store of activations, and mends it."""

import sys
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from groupsae.data.batches import HELDOUT_SEED
from groupsae.data.drawing import DrawnBatches
from groupsae.data.loader import block_order
from groupsae.data.rows import Show, by_model
from groupsae.data.splits import Split
from groupsae.data.store.fill import PAUSE, Filler, size_of
from groupsae.data.store.options import check_store
from groupsae.data.store.shard import Damaged, Layout, read_shard
from groupsae.data.store.store import ActivationStore, Gap, dtype_of, open_store
from groupsae.files.locks import try_lock
from groupsae.lm.hooked import HookedLM
from groupsae.runtime.errors import UserError

REPAIRS = 3  # of one file: then it is the disk


class FilledBatches(DrawnBatches):
    """Token batches whose activations may be in a store; what makes them says the subclass.

    Without `keep_in` there is no store. With one, the language model is loaded only when
    something is missing in it, or damaged.

    Attributes:
        fill_seconds: that were spent on filling the store.
    """

    fill_seconds = 0.0
    _place: tuple[Path, torch.dtype, Callable[[str], object]] | None = None
    _store: ActivationStore | None = None

    @property
    @abstractmethod
    def hooked(self) -> HookedLM:
        """Return the language model, loaded if it is not yet."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the language model."""

    def keep_in(self, folder: str, dtype: str, say: Callable[[str], object]) -> None:
        """Read activations from a store in this folder, and write there what is missing.

        Args:
            folder: of all stores (data.cache); each content has a folder of its own there.
            dtype: of what is stored (data.cache_dtype).
            say: prints a sentence, in one process of several.

        Raises:
            UserError: activations are not stored so.
        """
        check_store(folder, dtype)
        self._place = Path(folder), dtype_of(dtype), say

    @property
    def is_stored(self) -> bool:
        """Return whether activations come from a store."""
        return self._place is not None

    @property
    def stored_dtype(self) -> str:
        """Return what activations are stored in."""
        assert self._place is not None
        return str(self._place[1]).removeprefix("torch.")

    @property
    def store(self) -> ActivationStore:
        """Return the store of this text and model, opened; the text is packed first if need be.

        Raises:
            UserError: its folder cannot be written.
        """
        assert self._place is not None, "there is no store without keep_in"
        if self._store is None:
            folder, dtype, _ = self._place
            blocks = self.blocks.blocks
            # what a name or a folder is called matters to nobody: the fingerprint tells
            read = ("dtype", "hookpoint", "stack", "blocks_path", "submodule", "load")
            described = self.lm.described()
            self._store = open_store(
                folder,
                {
                    **{key: described[key] for key in read},
                    "weights": self.lm.fingerprint(),
                    "text": self.blocks.key,
                },
                Layout(self.packing.context, self.lm.geometry.d_model, dtype),
                {split: len(blocks[split]) for split in blocks},
            )
            self._repairs: Counter[Path] = Counter()
        return self._store

    def needed(self, split: Split, num_steps: int) -> list[int]:
        """Return the blocks that so many steps of a split read, in the order of first use."""
        available = len(self.blocks.blocks[split])
        count = min(available, num_steps * self.blocks_per_step)
        if split == "calibration":
            return list(range(count))
        seed = self.seed if split == "train" else HELDOUT_SEED
        order: list[int] = block_order(available, seed, 0, count).tolist()
        return order

    def fill_calibration(self, tokens: int) -> None:
        """Write every layer of so many calibration tokens, where they are missing.

        Raises:
            UserError: the disk has no room for them and for what training needs afterwards.
        """
        if not self.is_stored:
            return
        self.store.refresh()  # other runs may have written since
        every = list(range(self.lm.geometry.num_layers))
        blocks = self.needed("calibration", self.steps_for("calibration", tokens))
        # the grouping may leave the last layer out, no other
        layout = self.store.layout
        later = sum(size_of(gap, layout) for gap in self._training_gaps(every[:-1] or every))
        self._fill(self.store.gaps("calibration", blocks, every), later)

    def has_calibration(self, num_steps: int) -> bool:
        """Return whether every layer of so many calibration steps can be read from a store."""
        every = range(self.lm.geometry.num_layers)
        blocks = self.needed("calibration", num_steps)
        return self.is_stored and not self.store.gaps("calibration", blocks, every)

    def fill_training(self) -> None:
        """Write what training and validation of the chosen slots read, where it is missing.

        Raises:
            UserError: the disk has no room for it.
        """
        if self.is_stored:
            self.store.refresh()
            self._fill(self._training_gaps(self.used_layers()), 0)

    def _training_gaps(self, layers: list[int]) -> list[Gap]:
        train = self.needed("train", self.num_steps)
        heldout = self.needed("heldout", self.steps_for("heldout", self.heldout_tokens))
        return [
            *self.store.gaps("train", train, layers),
            *self.store.gaps("heldout", heldout, layers),
        ]

    def _fill(self, gaps: list[Gap], later: int) -> None:
        if gaps:
            self.fill_seconds += self._filler(show=True).fill(gaps, later)
            self.release()

    def _filler(self, *, show: bool) -> Filler:
        assert self._place is not None
        rank, processes = self._rank()

        def model(split: Split, blocks: Sequence[int]) -> Show:
            return by_model(self.hooked, self._tokens(split, blocks).to(self.device))

        return Filler(
            self.store, model, self.blocks_per_step // processes, self.blocks_per_forward,
            rank, processes, self._place[2], show and rank == 0,
        )  # fmt: skip

    def _repair(self, damaged: Damaged) -> None:
        """Write a file anew that is not what was written, and no other.

        Raises:
            UserError: that does not help.
        """
        began, path, mine = time.perf_counter(), damaged.path, False
        gap = self.store.forget(path)
        while gap is not None and not mine:
            with try_lock(path.parent) as mine:
                # or another process was faster, or another batch that read the same file
                if mine and not _is_whole(path, self.store.layout):
                    self._count(damaged)
                    self._filler(show=False).rewrite(path, gap)
                    self.release()
            if not mine:
                time.sleep(PAUSE)
        self.store.refresh()
        self.fill_seconds += time.perf_counter() - began

    def _count(self, damaged: Damaged) -> None:
        """Say that a file is written anew, in whichever process found it; but not for ever."""
        assert self._place is not None
        self._repairs[damaged.path] += 1
        if self._repairs[damaged.path] > REPAIRS:
            raise UserError(
                f"{damaged}, though it was written anew {REPAIRS} times: the disk is not to be "
                "trusted. Name another folder (data.cache=<folder>), or data.cache=null."
            )
        sentence = f"{damaged}: it is written anew."
        rank, _ = self._rank()
        if rank == 0:
            self._place[2](sentence)
        else:
            print(f"process {rank}: {sentence}", file=sys.stderr, flush=True)

    def _tokens(self, split: Split, blocks: Sequence[int]) -> Int64[Tensor, "block pos"]:
        return torch.from_numpy(self.blocks.blocks[split][list(blocks)].astype("int64"))

    def _rank(self) -> tuple[int, int]:
        trainer: Any = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def _is_whole(path: Path, layout: Layout) -> bool:
    """Return whether every block of a file is what was written."""
    try:
        shard = read_shard(path, layout)
        block = torch.empty(layout.context, layout.d_model, dtype=layout.dtype)
        for row in range(len(shard.blocks)):
            shard.read(row, block)
    except Damaged:
        return False
    return True
