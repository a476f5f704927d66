"""From stored blocks to rows of activations, read ahead while the step before them runs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from groupsae.data.batch import ActivationBatch
from groupsae.data.drawn import DrawnTokens
from groupsae.data.exchange import Exchange
from groupsae.data.filters import TokenFilter
from groupsae.data.rows import which_count, write_rows
from groupsae.data.splits import Split
from groupsae.data.spread import SpreadTokens, exchange_parts
from groupsae.data.store.shard import Damaged
from groupsae.data.store.store import ActivationStore
from groupsae.lm.hooked import Visit

AHEAD = 2  # batches that are read while one is worked on, and what memory holds of them

Item = TypeVar("Item")
Made = TypeVar("Made")


class StoredRows(NamedTuple):
    """Rows that were read from a store, with what was decided about their tokens.

    Attributes:
        drawn: the tokens.
        acts: rows, in the store's dtype: on a GPU they become float32 there.
        keep: which rows count, where norms decide it; None where they do not.
    """

    drawn: DrawnTokens | SpreadTokens
    acts: Shaped[Tensor, "slot token d_model"]
    keep: Bool[Tensor, "slot token"] | None

    def to(self, device: torch.device) -> "StoredRows":
        """Return everything on the device; a GPU fetches it by itself, if it is pinned."""
        by_itself = device.type == "cuda"
        return StoredRows(
            self.drawn.to(device),
            self.acts.to(device, non_blocking=by_itself),
            None if self.keep is None else self.keep.to(device, non_blocking=by_itself),
        )

    def batch(self, exchange: Exchange | None) -> ActivationBatch:
        """Return them as the language model would have made them; what lies on the device.

        Args:
            exchange: sends them to the processes that need them; None where they stay.
        """
        if isinstance(self.drawn, SpreadTokens):
            assert exchange is not None
            return exchange_parts([(self.acts, self.keep)], self.drawn, exchange)
        keep, counted = self.keep, self.drawn.counted
        if keep is None and counted is not None:
            keep = counted.expand(len(self.acts), -1)
        kept = self.drawn.kept if self.keep is None else None
        return ActivationBatch(self.acts.float(), self.drawn.layers, keep, kept)


class RowReader:
    """Reads the rows that tokens drew; of each layer whole blocks, each once.

    Not to be used by two threads at once: it reads into one buffer.

    Args:
        store: that they are in.
        split: of the packed corpus.
        filters: which rows count by their norm.
        blocks_per_forward: as drawn with; so many blocks of one layer are in memory.
        threads: that read at once.
        pinned: whether the rows lie in page-locked memory, from which a GPU fetches them.
    """

    def __init__(
        self,
        store: ActivationStore,
        split: Split,
        filters: TokenFilter,
        *,
        blocks_per_forward: int,
        threads: int,
        pinned: bool,
    ) -> None:
        self.store, self.split, self.filters = store, split, filters
        self.blocks_per_forward, self.pinned = blocks_per_forward, pinned
        self.pool = ThreadPoolExecutor(threads, "read-activations")
        layout = store.layout
        self.buffer = torch.empty(
            blocks_per_forward, layout.context, layout.d_model, dtype=layout.dtype
        )

    @torch.no_grad()
    def rows(
        self, drawn: DrawnTokens, slots: list[list[int]], blocks: Sequence[int]
    ) -> tuple[Shaped[Tensor, "slot token d_model"], Bool[Tensor, "slot token"] | None]:
        """Return the rows, and which of them count if norms decide it; everything on the host.

        Args:
            drawn: tokens and draws.
            slots: those that were drawn from.
            blocks: the numbers of the tokens' blocks in the split.

        Raises:
            Damaged: a file is not what was written.
            KeyError: a block is not there.
        """
        layout, tokens = self.store.layout, drawn.tokens
        acts = torch.empty(
            len(slots), tokens.numel(), layout.d_model, dtype=layout.dtype, pin_memory=self.pinned
        )
        by_norm = self.filters.max_norm_ratio is not None
        keep = which_count(drawn, self.filters, len(slots)) if by_norm else None

        def show(part: slice, layers: Iterable[int], visit: Visit) -> None:
            wanted = blocks[part]
            for layer in sorted(layers):
                found = self.buffer[: len(wanted)]
                # results are looked at, or errors would be lost
                list(self.pool.map(self._read, wanted, [layer] * len(wanted), found))
                visit(layer, found)

        size = self.blocks_per_forward * tokens.shape[1]
        for number, start in enumerate(range(0, tokens.numel(), size)):
            where = slice(start, min(start + size, tokens.numel()))
            kept = None if keep is None else keep[:, where]
            write_rows(show, self.filters, drawn, slots, number, where, acts[:, where], kept)
        return acts, keep.pin_memory() if keep is not None and self.pinned else keep

    def _read(self, block: int, layer: int, out: Tensor) -> None:
        self.store.read(self.split, block, layer, out)


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Made],
    repair: Callable[[Damaged], object],
) -> Iterator[Made]:
    """Yield what `read` makes of each item; the next ones are read meanwhile, in another thread.

    Args:
        items: what to read, in this order.
        read: may raise `Damaged`; then the item is read again when that is repaired.
        repair: mends what is damaged, in the same thread.
    """
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        waiting: deque[tuple[Item, Future[Made]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(read, item)))
                if len(waiting) > AHEAD:
                    yield _result(*waiting.popleft(), pool, read, repair)
            while waiting:
                yield _result(*waiting.popleft(), pool, read, repair)
        finally:
            for _, left in waiting:
                left.cancel()


def _result(
    item: Item,
    future: Future[Made],
    pool: ThreadPoolExecutor,
    read: Callable[[Item], Made],
    repair: Callable[[Damaged], object],
) -> Made:
    while True:
        try:
            return future.result()
        except Damaged as damaged:
            # in the reading thread: nothing is read from what is just being mended
            pool.submit(repair, damaged).result()
            future = pool.submit(read, item)
