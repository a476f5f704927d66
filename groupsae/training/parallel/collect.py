"""Small plain values of all processes."""

from typing import TypeVar

import torch

T = TypeVar("T")


def leads() -> bool:
    """Return whether this is the first process of the run, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def of_each(value: T) -> list[T]:
    """Return what each process gives, by rank; every process of the run has to call it.

    For a few numbers or names now and then: the host waits.
    """
    if not torch.distributed.is_initialized():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
