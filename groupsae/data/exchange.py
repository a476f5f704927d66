"""Which process needs which rows of activations, and how the rows get there."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from groupsae.runtime import compat

Swap = Callable[[Tensor, list[int], list[int]], Tensor]
# Activations [slot, token, d_model], and which of them count where norms decide it.
Rows = tuple[Tensor, Tensor | None]


def all_to_all(mesh: DeviceMesh) -> Swap:
    """Return the all-to-all over a mesh of one dimension.

    It starts immediately and runs in parallel with the code after it, on the device's own stream
    for collectives. The first use of its result waits for it.
    """

    def swap(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        exchanged: Tensor = compat.all_to_all(rows, received, sent, mesh)
        return exchanged

    return swap


class Exchange:
    """Which slots' rows each process needs. A slot is a set of layers, each token showing one.

    A set of which a token shows several layers is there as often, one after the other.

    Without `swap` rows stay in the process that made them: it is the only one, or each process
    trains all SAEs on its own share of a batch. `Exchange([slots])` is that.

    With `swap` the SAEs are shared out. Every process makes the rows of an equal share of a
    batch, for every slot that any process needs; a slot that several need is sent to each of
    them. So all sizes are known in advance, and no process waits to learn one.

    Args:
        wanted: for each process, the slots that it needs.
        rank: this process.
        swap: starts an all-to-all over the first dimension: rows, how many go to each process,
            how many come from each -> rows in the order of the processes that they come from.
    """

    def __init__(
        self, wanted: Sequence[list[list[int]]], rank: int = 0, swap: Swap | None = None
    ) -> None:
        self.wanted, self.rank, self.swap = list(wanted), rank, swap

    @property
    def travels(self) -> bool:
        """Return whether rows are sent to other processes."""
        return self.swap is not None

    @property
    def sent(self) -> list[list[int]]:
        """Return the slots that this process makes rows of, in the order that it sends them."""
        return [slot for slots in self.wanted for slot in slots]

    @property
    def own(self) -> list[list[int]]:
        """Return the slots that this process gets rows of, in the order of arrival."""
        return self.wanted[self.rank]

    def share(self, num_blocks: int) -> slice:
        """Return which blocks of a batch this process makes rows of."""
        size = num_blocks // len(self.wanted)
        return slice(self.rank * size, (self.rank + 1) * size)

    def collect(self, parts: Iterable[Rows]) -> Rows:
        """Send each part of this process's rows as soon as it is made; return the received rows.

        All processes call it for equal parts of rows of `sent`, in the same order. Where rows stay
        there is exactly one part.

        Returns:
            Rows of `own` for the tokens of all processes, activations as float32.
        """
        if self.swap is None:
            ((acts, keep),) = parts
            return acts.float(), keep
        outgoing, incoming, masks = [], [], []
        for acts, keep in parts:
            outgoing.append(acts)  # kept until all have arrived
            incoming.append(self._start(acts))
            if keep is not None:
                masks.append(self._start(keep.contiguous()))
        return self._join(incoming, torch.float32), self._join(
            masks, torch.bool
        ) if masks else None

    def _start(
        self, rows: Shaped[Tensor, "sent token *each"]
    ) -> Shaped[Tensor, "process_own token *each"]:
        assert self.swap is not None
        received = [len(self.own)] * len(self.wanted)
        return self.swap(rows, [len(slots) for slots in self.wanted], received)

    def _join(
        self, parts: Sequence[Shaped[Tensor, "process_own _ *each"]], dtype: torch.dtype
    ) -> Shaped[Tensor, "own token *each"]:
        """Return the received rows in the order of the tokens: by process, then by part."""
        processes, own = len(self.wanted), len(self.own)
        share, rest = sum(part.shape[1] for part in parts), parts[0].shape[2:]
        joined = torch.empty(own, processes, share, *rest, dtype=dtype, device=parts[0].device)
        place = 0
        for part in parts:
            size = part.shape[1]
            arrived = part.view(processes, own, size, *rest).transpose(0, 1)
            joined[:, :, place : place + size].copy_(arrived)
            place += size
        return joined.flatten(1, 2)

    def bytes_per_token(self, width: int) -> tuple[list[int], list[int]]:
        """Return the bytes that each process sends and receives, per token of its share.

        A row has `width` bytes.
        """
        every = len(self.sent)
        sent = [width * (every - len(slots)) for slots in self.wanted]
        received = [width * len(slots) * (len(self.wanted) - 1) for slots in self.wanted]
        return sent, received
