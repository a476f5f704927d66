"""Rows on their way from the process that makes them to the processes that need them."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from groupsae.runtime import compat

Swap = Callable[[Tensor, list[int], list[int]], Tensor]


def all_to_all(mesh: DeviceMesh) -> Swap:
    """Return the all-to-all over a mesh of one dimension.

    It begins at once and runs beside what follows, on the device's own stream for collectives;
    what it gives is waited for where it is first used.
    """

    def swap(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        exchanged: Tensor = compat.all_to_all(rows, received, sent, mesh)
        return exchanged

    return swap


class Exchange:
    """Which slots' rows each process needs, and how they come to it.

    Every process makes the rows of an equal share of the tokens, for every slot that anyone
    needs; a slot that several need is sent to each of them. So all sizes are known beforehand,
    and no process waits to be told one.

    Args:
        wanted: for each process, the slots that it needs, each a set of layers.
        rank: this process.
        swap: starts an all-to-all over the first dimension: rows, how many go to each process,
            how many come from each -> rows in the order of the processes that they come from.
    """

    def __init__(self, wanted: Sequence[list[list[int]]], rank: int, swap: Swap) -> None:
        self.wanted, self.rank, self.swap = list(wanted), rank, swap

    @property
    def sent(self) -> list[list[int]]:
        """Return the slots that this process makes rows of, in the order that `start` takes."""
        return [slot for slots in self.wanted for slot in slots]

    @property
    def own(self) -> list[list[int]]:
        """Return the slots that this process gets rows of, in the order that they come in."""
        return self.wanted[self.rank]

    def start(
        self, rows: Shaped[Tensor, "sent token *each"]
    ) -> Shaped[Tensor, "process_own token *each"]:
        """Send a part of this process's rows; return those that come in, to be waited for.

        All processes call it for equal parts, in the same order.
        """
        received = [len(self.own)] * len(self.wanted)
        return self.swap(rows, [len(slots) for slots in self.wanted], received)

    def join(
        self, parts: Sequence[Shaped[Tensor, "process_own _ *each"]], dtype: torch.dtype
    ) -> Shaped[Tensor, "own token *each"]:
        """Return what came in, in the order of the tokens: by process, then by part.

        Args:
            parts: of `start`, of all parts of a process's share in their order.
            dtype: of what is returned.
        """
        processes, own = len(self.wanted), len(self.own)
        share, rest = sum(part.shape[1] for part in parts), parts[0].shape[2:]
        joined = torch.empty(own, processes, share, *rest, dtype=dtype, device=parts[0].device)
        place = 0
        for part in parts:
            size = part.shape[1]
            came = part.view(processes, own, size, *rest).transpose(0, 1)
            joined[:, :, place : place + size].copy_(came)
            place += size
        return joined.flatten(1, 2)

    def bytes_per_token(self, width: int) -> tuple[list[int], list[int]]:
        """Return what each process sends to and gets from others, per token of its share.

        Args:
            width: bytes of a row.
        """
        every = len(self.sent)
        sent = [width * (every - len(slots)) for slots in self.wanted]
        received = [width * len(slots) * (len(self.wanted) - 1) for slots in self.wanted]
        return sent, received
