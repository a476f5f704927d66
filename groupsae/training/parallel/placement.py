"""Which process owns which SAE."""

from collections.abc import Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """What an SAE costs its owner.

    Attributes:
        flops: of a training step, per token.
        memory: bytes of weights, gradients and optimiser state.
        slot: the rows that it is trained on; owners of SAEs with the same slot each get them.
    """

    flops: float
    memory: float
    slot: int


def place(costs: Sequence[Cost], num_processes: int) -> list[list[int]]:
    """Return for each process the indices of the SAEs that it owns, ascending; maybe none.

    Longest processing time first (Graham 1969): the most expensive SAE that is left goes to the
    process with the least work. Cost is the share of all FLOPs plus the share of all memory. Of
    processes with equally little work one that gets the SAE's rows anyway is taken, then the
    lower rank; so every process works out the same.

    >>> place([Cost(4, 4, 0), Cost(3, 3, 1), Cost(3, 3, 2)], 2)
    [[0], [1, 2]]
    >>> place([Cost(1, 1, 0)], 2)
    [[0], []]
    """
    flops = sum(cost.flops for cost in costs) or 1
    memory = sum(cost.memory for cost in costs) or 1
    # in billionths of everything: sums of whole numbers are equal or not in any order
    share = [round(1e9 * (cost.flops / flops + cost.memory / memory)) for cost in costs]
    work = [0] * num_processes
    owned: list[list[int]] = [[] for _ in range(num_processes)]
    for index in sorted(range(len(costs)), key=lambda i: (-share[i], i)):
        least = min(work)
        free = [rank for rank in range(num_processes) if work[rank] == least]
        slot = costs[index].slot
        gets_it = [rank for rank in free if any(costs[i].slot == slot for i in owned[rank])]
        rank = (gets_it or free)[0]
        work[rank] += share[index]
        owned[rank].append(index)
    return [sorted(mine) for mine in owned]
