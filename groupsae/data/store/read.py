"""Reads the rows that tokens drew from a store, ahead of their use."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from groupsae.data.draws import DrawnTokens
from groupsae.data.filters import TokenFilter
from groupsae.data.packing import Split
from groupsae.data.rows import all_rows
from groupsae.data.store.shard import Damaged
from groupsae.data.store.store import ActivationStore
from groupsae.files.atomic import explain_write_errors
from groupsae.lm.hooked import Visit
from groupsae.runtime.errors import UserError

AHEAD = 2  # batches that are read while one is worked on; bounds their memory

Item = TypeVar("Item")
Batch = TypeVar("Batch")


class StoredLoader(Iterable[Any]):
    """Batches that are read when they are asked for; its length is the complete run."""

    def __init__(self, num_steps: int, batches: Callable[[], Iterator[Any]]) -> None:
        self.num_steps, self.batches = num_steps, batches

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Any]:
        return self.batches()


class RowReader:
    """Reads the rows that tokens drew; of each layer complete blocks, each once.

    Do not use it from two threads: it reads into one buffer of `blocks_per_forward` blocks
    of one layer. `pinned`: rows lie in page-locked memory, from which a GPU fetches them.
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
        self.store, self.split, self.filters, self.pinned = store, split, filters, pinned
        self.pool = ThreadPoolExecutor(threads, "read-activations")
        layout = store.layout
        self.buffer = torch.empty(
            blocks_per_forward, layout.context, layout.d_model, dtype=layout.dtype
        )

    @torch.no_grad()
    def read(self, blocks: Sequence[int], drawn: DrawnTokens) -> DrawnTokens:
        """Return the tokens with their rows, on the host.

        Raises:
            UserError: a file is damaged or cannot be read.
        """
        layout = self.store.layout
        acts = torch.empty(
            len(drawn.exchange.sent), drawn.tokens.numel(), layout.d_model, dtype=layout.dtype,
            pin_memory=self.pinned,
        )  # fmt: skip

        def show(part: slice, layers: Iterable[int], visit: Visit) -> None:
            wanted = blocks[part]
            for layer in sorted(layers):
                shown = self.buffer[: len(wanted)]
                # the results are used, or errors would be lost
                list(self.pool.map(self._read, wanted, [layer] * len(wanted), shown))
                visit(layer, shown)

        acts, keep = all_rows(show, self.filters, drawn, acts)
        if keep is not None and self.pinned:
            keep = keep.pin_memory()
        return drawn._replace(stored=(acts, keep))

    def _read(self, block: int, layer: int, out: Tensor) -> None:
        try:
            self.store.read(self.split, block, layer, out)
        except Damaged as error:
            with explain_write_errors(error.path, "data.cache=<folder>"):
                error.path.unlink(missing_ok=True)
            raise UserError(
                f"{error}. It was deleted: give the same command again, which fills this file of "
                "the store again and resumes the run."
            ) from error


def read_ahead(items: Iterable[Item], read: Callable[[Item], Batch]) -> Iterator[Batch]:
    """Yield the result of `read` for each item; another thread reads the next ones meanwhile."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
