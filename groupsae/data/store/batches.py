"""The part of a data module that reads activations from a store, and fills it."""

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from groupsae.data.batch import ActivationBatch
from groupsae.data.batches import HELDOUT_SEED, TokenBatches
from groupsae.data.drawn import DrawnTokens
from groupsae.data.exchange import Exchange
from groupsae.data.filters import TokenFilter
from groupsae.data.loader import block_order
from groupsae.data.rows import Show, by_model
from groupsae.data.splits import Split
from groupsae.data.spread import SpreadTokens
from groupsae.data.store.fill import PAUSE, Filler, size_of
from groupsae.data.store.lock import claimed
from groupsae.data.store.options import check_store
from groupsae.data.store.rows import RowReader, StoredRows, read_ahead
from groupsae.data.store.shard import Damaged, Layout, read_shard
from groupsae.data.store.store import ActivationStore, Gap, dtype_of, open_store
from groupsae.errors import UserError
from groupsae.lm.hooked import HookedLM

REPAIRS = 3  # of one file: then it is the disk

Batch = TypeVar("Batch", covariant=True)


class StoredLoader(Iterable[Batch]):
    """Batches that are made as they are asked for; as long as the whole run, like its sampler."""

    def __init__(self, num_steps: int, batches: Callable[[], Iterator[Batch]]) -> None:
        self.num_steps, self.batches = num_steps, batches

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()


class StoredParts:
    """A validation batch, which is read part by part as it is looked at."""

    def __init__(self, rows: Callable[[], Iterator[StoredRows]]) -> None:
        self.rows = rows


class StoredBatches(TokenBatches):
    """Token batches whose activations may come from a store; what makes them says the subclass.

    Without `keep_in` there is no store. With one, the language model is loaded only when
    something is missing in it, or damaged.

    Attributes:
        fill_seconds: that were spent on filling the store.
    """

    slots: list[list[int]]
    exchanges: tuple[Exchange, Exchange] | None
    blocks_per_forward: int
    fill_seconds = 0.0
    _place: tuple[Path, torch.dtype, Callable[[str], object]] | None = None
    _store: ActivationStore | None = None

    @property
    @abstractmethod
    def hooked(self) -> HookedLM:
        """Return the language model, loaded if it is not yet."""

    @property
    @abstractmethod
    def filters(self) -> TokenFilter:
        """Return which tokens count."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the language model."""

    @abstractmethod
    def used_layers(self) -> list[int]:
        """Return the layers that training needs."""

    @abstractmethod
    def drawn(self, tokens: Tensor, slots: list[list[int]], first_position: int) -> DrawnTokens:
        """Return the draws for tokens."""

    @abstractmethod
    def spread(
        self, batch: Tensor, first_block: int, *, training: bool
    ) -> SpreadTokens | list[SpreadTokens]:
        """Return the draws for tokens of all processes."""

    # ---- the store ----------------------------------------------------------------------

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
        assert self._place is not None
        store, gap = self.store, self.store.forget(damaged.path)
        if gap is None:  # mended since
            return
        self._repairs[damaged.path] += 1
        if self._repairs[damaged.path] > REPAIRS:
            raise UserError(
                f"{damaged}, though it was written anew {REPAIRS} times: the disk is not to be "
                "trusted. Name another folder (data.cache=<folder>), or data.cache=null."
            )
        self._place[2](f"{damaged}: it is written anew.")
        while True:
            with claimed(damaged.path.parent) as mine:
                if mine:
                    if not _is_whole(damaged.path, store.layout):  # another process was faster
                        damaged.path.unlink(missing_ok=True)
                    break
            time.sleep(PAUSE)
        store.refresh()
        lacking = store.gaps(gap.split, gap.blocks, gap.layers)
        self.fill_seconds += self._filler(show=False).fill(lacking, 0)

    # ---- batches ------------------------------------------------------------------------

    def stored_training(self) -> StoredLoader[StoredRows]:
        """Return the training batches from `blocks_seen` on, with their rows."""
        first, whole = self.blocks_seen // self.blocks_per_step, self.exchanges is not None
        sampler = self.steps("train", self.num_steps, self.seed, first, whole)

        def batches() -> Iterator[StoredRows]:
            reader = self._reader("train")
            rank, processes = self._rank()
            share = self.blocks_per_step // processes

            def read(item: tuple[int, list[int]]) -> StoredRows:
                step, blocks = item
                tokens, start = self._tokens("train", blocks), step * self.blocks_per_step
                if self.exchanges is None:
                    place = (start + rank * share) * self.packing.context
                    drawn = self.drawn(tokens, self.slots, place)
                    return StoredRows(drawn, *reader.rows(drawn, self.slots, blocks))
                spread = self.spread(tokens, start, training=True)
                assert isinstance(spread, SpreadTokens)
                mine = blocks[rank * share : (rank + 1) * share]
                slots = self.exchanges[0].sent
                return StoredRows(spread, *reader.rows(spread.mine, slots, mine))

            return read_ahead(enumerate(sampler, first), read, self._repair)

        return StoredLoader(len(sampler), batches)

    def stored_heldout(self, num_steps: int) -> StoredLoader[StoredParts]:
        """Return the held-out batches, of every used layer."""
        sampler = self.steps("heldout", num_steps, HELDOUT_SEED, 0, self.exchanges is not None)

        def batches() -> Iterator[StoredParts]:
            reader = self._reader("heldout")
            for blocks in sampler:
                yield StoredParts(partial(self._heldout_parts, reader, blocks))

        return StoredLoader(len(sampler), batches)

    def _heldout_parts(self, reader: RowReader, blocks: list[int]) -> Iterator[StoredRows]:
        if self.exchanges is None:
            slots = [[layer] for layer in self.used_layers()]
            return self._parts(reader, blocks, slots)
        slots = self.exchanges[1].sent
        rank, processes = self._rank()
        share = len(blocks) // processes
        mine = blocks[rank * share : (rank + 1) * share]
        spread = self.spread(self._tokens("heldout", blocks), 0, training=False)
        assert isinstance(spread, list)
        size = self.blocks_per_forward
        cut = [mine[i : i + size] for i in range(0, share, size)]

        def read(item: tuple[SpreadTokens, list[int]]) -> StoredRows:
            return StoredRows(item[0], *reader.rows(item[0].mine, slots, item[1]))

        return read_ahead(zip(spread, cut, strict=True), read, self._repair)

    def stored_calibration(self, num_steps: int) -> Iterator[ActivationBatch]:
        """Yield every layer's activations over this rank's share of the calibration split."""
        reader = self._reader("calibration")
        slots = [[layer] for layer in range(self.lm.geometry.num_layers)]
        for blocks in self.steps("calibration", num_steps, None):
            for rows in self._parts(reader, blocks, slots):
                yield rows.to(self.device).batch(None)

    def _parts(
        self, reader: RowReader, blocks: list[int], slots: list[list[int]]
    ) -> Iterator[StoredRows]:
        """Yield the rows of blocks, `blocks_per_forward` at a time; every slot is one layer."""
        size = self.blocks_per_forward

        def read(part: list[int]) -> StoredRows:
            drawn = self.drawn(self._tokens(reader.split, part), slots, 0)
            return StoredRows(drawn, *reader.rows(drawn, slots, part))

        cut = (blocks[i : i + size] for i in range(0, len(blocks), size))
        return read_ahead(cut, read, self._repair)

    def stored_first(self, slots: list[list[int]], num_blocks: int) -> ActivationBatch:
        """Return the first rows of training."""
        reader = self._reader("train")
        blocks = next(iter(self.steps("train", 1, self.seed)))[:num_blocks]

        def read(mine: list[int]) -> StoredRows:
            drawn = self.drawn(self._tokens("train", mine), slots, 0)
            return StoredRows(drawn, *reader.rows(drawn, slots, mine))

        (rows,) = read_ahead([blocks], read, self._repair)
        return rows.to(self.device).batch(None)

    def _reader(self, split: Split) -> RowReader:
        return RowReader(
            self.store,
            split,
            self.filters,
            blocks_per_forward=self.blocks_per_forward,
            threads=max(1, self.num_workers),
            pinned=self.device.type == "cuda",
        )

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
