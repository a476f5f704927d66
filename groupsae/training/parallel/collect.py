"""Exchanges small plain values between the processes of a run."""

from collections.abc import Mapping
from typing import TypeVar

import torch

T = TypeVar("T")


def leads() -> bool:
    """Return whether this is the first process of the run, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def num_processes() -> int:
    """Return the number of processes of the run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Return the value of each process, by rank; every process of the run has to call it.

    For a few numbers or names now and then: the host waits.
    """
    if not torch.distributed.is_initialized():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_named(values: Mapping[str, T]) -> dict[str, T]:
    """Return the named values of all processes; every process of the run has to call it."""
    return {name: value for each in gather(dict(values)) for name, value in each.items()}
