"""The part of a data module that reads activations from a store."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

from groupsae.data.batch import ActivationBatch
from groupsae.data.batches import HELDOUT_SEED
from groupsae.data.splits import Split
from groupsae.data.spread import SpreadTokens
from groupsae.data.store.filled import FilledBatches
from groupsae.data.store.rows import RowReader, StoredRows, read_ahead

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


class StoredBatches(FilledBatches):
    """Token batches whose activations come from a store."""

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
