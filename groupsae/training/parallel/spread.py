"""Spread a suite's SAEs over the processes, and say what falls to each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from groupsae.data.activations import ActivationDataModule
from groupsae.data.exchange import Exchange, Swap
from groupsae.grouping.plan import GroupPlan
from groupsae.training.forecast import FLOAT, STATE, bytes_needed
from groupsae.training.parallel.placement import Cost, place
from groupsae.training.suite import GroupSAESuite

SHOWN = 16  # processes


class Share(NamedTuple):
    """What falls to one process.

    Attributes:
        names: of its SAEs.
        memory: bytes that training them needs, beside the language model's.
        sent: bytes of activations to other processes in a step.
        received: bytes from others.
    """

    names: list[str]
    memory: int
    sent: int
    received: int


def owners(suite: GroupSAESuite, plan: GroupPlan, num_processes: int) -> list[list[int]]:
    """Return for each process the numbers in the plan of the SAEs that it holds."""
    return place(_costs(suite, plan), num_processes)


def busiest(suite: GroupSAESuite, plan: GroupPlan, num_processes: int) -> list[int]:
    """Return what the process holds whose SAEs take the most memory."""
    costs = _costs(suite, plan)
    return max(place(costs, num_processes), key=lambda mine: sum(costs[i].memory for i in mine))


def _costs(suite: GroupSAESuite, plan: GroupPlan) -> list[Cost]:
    slots, sizes = plan.slots, [suite.size(planned.width) for planned in plan.members]
    return [
        Cost(size.flops, FLOAT * STATE * size.parameters, slots.index(planned.layers))
        for size, planned in zip(sizes, plan.members, strict=True)
    ]


def spread(
    suite: GroupSAESuite,
    data: ActivationDataModule,
    owned: Sequence[Sequence[int]],
    rank: int,
    swap: Swap,
) -> list[Share]:
    """Let the stream bring each process the rows that its SAEs need; return what falls to each.

    Args:
        suite: knows its plan.
        data: knows its slots.
        owned: of `owners`.
        rank: this process.
        swap: an all-to-all over the processes.
    """
    plan = suite.plan
    assert plan is not None
    used = [{x for i in mine for x in plan.members[i].layers} for mine in owned]
    training = Exchange([suite.slots_of(mine) for mine in owned], rank, swap)
    validation = Exchange([[[layer] for layer in sorted(each)] for each in used], rank, swap)
    data.exchange(training, validation)
    return shares(suite, data, owned, training, data.travelling)


def shares(
    suite: GroupSAESuite,
    data: ActivationDataModule,
    owned: Sequence[Sequence[int]],
    exchange: Exchange,
    dtype: torch.dtype,
) -> list[Share]:
    """Return what falls to each process.

    Memory is the larger of two moments: rows on their way (what is sent, what has come in and
    what it is put together to), or the SAEs' step.

    Args:
        suite: knows its plan.
        data: the stream.
        owned: of `owners`.
        exchange: of training.
        dtype: that rows travel in.
    """
    plan = suite.plan
    assert plan is not None
    tokens = data.tokens_per_step // len(owned)
    mask = 1 if data.max_norm_ratio is not None else 0  # byte of a row: whether it counts
    row = suite.d_model * dtype.itemsize + mask
    sent, received = exchange.bytes_per_token(row)
    found = []
    for rank, mine in enumerate(owned):
        widths = [plan.members[i].width for i in mine]
        state = FLOAT * STATE * sum(suite.size(width).parameters for width in widths)
        slots = len(exchange.wanted[rank])
        joined = FLOAT * suite.d_model * slots * data.tokens_per_step
        moving = tokens * row * (len(exchange.sent) + slots * len(owned)) + joined
        memory = max(bytes_needed(suite, data, widths, 1), state + moving)
        names = [plan.members[i].name for i in mine]
        found.append(Share(names, memory, tokens * sent[rank], tokens * received[rank]))
    return found


def described(found: Sequence[Share]) -> str:
    """Return a line for each process."""
    lines = [
        f"process {rank}: {', '.join(each.names) or 'no SAE, only the language model'}; "
        f"{each.memory / 1e9:.2f} GB for them; "
        f"{each.sent / 1e6:,.1f} MB sent and {each.received / 1e6:,.1f} MB received in a step"
        for rank, each in enumerate(found[:SHOWN])
    ]
    if len(found) > SHOWN:
        rest = found[SHOWN:]
        lines.append(
            f"{len(rest)} more processes: at most {max(len(each.names) for each in rest)} SAEs, "
            f"{max(each.memory for each in rest) / 1e9:.2f} GB, "
            f"{max(each.sent for each in rest) / 1e6:,.1f} MB sent and "
            f"{max(each.received for each in rest) / 1e6:,.1f} MB received in a step"
        )
    return "\n".join(lines)
