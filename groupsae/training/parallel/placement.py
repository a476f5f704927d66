"""SAE-parallel: which process owns which SAE, and what that means for each."""

from collections.abc import Sequence
from typing import NamedTuple

from groupsae.data.activations import ActivationDataModule
from groupsae.data.exchange import Exchange, Swap
from groupsae.grouping.plan import GroupPlan
from groupsae.training.estimate import FLOAT, STATE, bytes_needed
from groupsae.training.suite import GroupSAESuite

SHOWN = 16  # processes


class Cost(NamedTuple):
    """What an SAE costs its owner."""

    flops: float  # of a training step, per token
    memory: float  # bytes of weights, gradients and optimiser state
    slot: int  # the rows it is trained on; owners of SAEs with the same slot each get them


class Share(NamedTuple):
    """What one process gets."""

    names: list[str]  # of its SAEs
    memory: int  # bytes that training them needs, without the language model's
    sent: int  # bytes of activations to other processes in a step
    received: int  # bytes from others


def place(costs: Sequence[Cost], num_processes: int) -> list[list[int]]:
    """Return for each process the indices of the SAEs that it owns, ascending; maybe none.

    Longest processing time first (Graham 1969): the most expensive SAE that is left goes to the
    process with the least work. Cost is the share of all FLOPs plus the share of all memory. Of
    processes with equally little work it takes one that gets the SAE's rows anyway, then the
    lower rank; so the result is the same in every process.

    >>> place([Cost(4, 4, 0), Cost(3, 3, 1), Cost(3, 3, 2)], 2)
    [[0], [1, 2]]
    >>> place([Cost(1, 1, 0)], 2)
    [[0], []]
    """
    flops = sum(cost.flops for cost in costs) or 1
    memory = sum(cost.memory for cost in costs) or 1
    # in integer billionths: their sums do not depend on the order
    share = [round(1e9 * (cost.flops / flops + cost.memory / memory)) for cost in costs]
    work = [0] * num_processes
    owned: list[list[int]] = [[] for _ in range(num_processes)]
    for index in sorted(range(len(costs)), key=lambda i: (-share[i], i)):
        free = [rank for rank in range(num_processes) if work[rank] == min(work)]
        slot = costs[index].slot
        gets_it = [rank for rank in free if any(costs[i].slot == slot for i in owned[rank])]
        rank = (gets_it or free)[0]
        work[rank] += share[index]
        owned[rank].append(index)
    return [sorted(indices) for indices in owned]


def owners(
    suite: GroupSAESuite, data: ActivationDataModule, plan: GroupPlan, num_processes: int
) -> list[list[int]]:
    """Return for each process the numbers in the plan of the SAEs that it holds."""
    costs = []
    for planned, size in zip(plan.members, suite.sizes_of(plan.members), strict=True):
        slot = plan.slots.index(planned.layers)
        flops = size.flops * data.rows_per_token(planned.layers)
        costs.append(Cost(flops, FLOAT * STATE * size.parameters, slot))
    return place(costs, num_processes)


def busiest(
    suite: GroupSAESuite, data: ActivationDataModule, plan: GroupPlan, num_processes: int
) -> list[int]:
    """Return the SAEs of the process whose SAEs have the most parameters."""
    sizes = [size.parameters for size in suite.sizes_of(plan.members)]
    owned = owners(suite, data, plan, num_processes)
    return max(owned, key=lambda own: sum(sizes[i] for i in own))


def spread(
    suite: GroupSAESuite,
    data: ActivationDataModule,
    owned: Sequence[Sequence[int]],
    rank: int,
    swap: Swap,
) -> list[Share]:
    """Make the stream send each process the rows of its SAEs; return the share of each process.

    Its memory is the larger of two moments: the exchange of rows (those sent, those received,
    and the batch they are joined to), or the SAEs' step. `owned` is the result of `owners`.
    """
    plan = suite.plan
    used = [sorted({x for i in own for x in plan.members[i].layers}) for own in owned]
    training = Exchange([data.each_row(plan.slots_of(own)) for own in owned], rank, swap)
    validation = Exchange([[[layer] for layer in layers] for layers in used], rank, swap)
    data.exchange(training, validation)
    tokens = data.tokens_per_step // len(owned)
    mask = 1 if data.max_norm_ratio is not None else 0  # byte of a row: whether it counts
    row = suite.d_model * data.travelling.itemsize + mask
    sent, received = training.bytes_per_token(row)
    shares = []
    for process, own in enumerate(owned):
        members = [plan.members[i] for i in own]
        state = FLOAT * STATE * sum(size.parameters for size in suite.sizes_of(members))
        slots = len(training.wanted[process])
        joined = FLOAT * suite.d_model * slots * data.tokens_per_step
        moving = tokens * row * (len(training.sent) + slots * len(owned)) + joined
        memory = max(bytes_needed(suite, data, members, 1), state + moving)
        names = [planned.name for planned in members]
        shares.append(Share(names, memory, tokens * sent[process], tokens * received[process]))
    return shares


def describe(found: Sequence[Share]) -> str:
    """Return a line for each of the first sixteen processes."""
    lines = [
        f"process {rank}: {', '.join(share.names) or 'no SAE, only the language model'}; "
        f"{share.memory / 1e9:.2f} GB for them; "
        f"{share.sent / 1e6:,.1f} MB sent and {share.received / 1e6:,.1f} MB received in a step"
        for rank, share in enumerate(found[:SHOWN])
    ]
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN} more processes")
    return "\n".join(lines)
