"""Integers that the device counts and the host reads a step later, without waiting for it."""

import torch
from jaxtyping import Int
from torch import Tensor


class Readback:
    """Integers from the device; `read` is usually called a step later.

    The copy to the host starts immediately and runs in parallel with the device. Reading waits
    for that copy only, not for work that the device got since.
    """

    def __init__(self, numbers: Int[Tensor, "number"]) -> None:
        self._copied: torch.cuda.Event | None = None
        if numbers.device.type != "cuda":
            self._numbers = numbers
            return
        # only into pinned memory does a copy not make the host wait
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._numbers.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self) -> list[int]:
        """Return the integers."""
        if self._copied is not None:
            self._copied.synchronize()
        return list(self._numbers.tolist())
