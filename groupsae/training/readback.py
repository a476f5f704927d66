"""Numbers that a device counts and the host wants, without waiting for the device."""

import torch
from jaxtyping import Int
from torch import Tensor


class Readback:
    """Whole numbers that were put in earlier, usually a step ago.

    The copy starts when they are put in and runs beside whatever the device does next. Reading
    waits for that copy only, not for what was asked of the device since.
    """

    def __init__(self, numbers: Int[Tensor, "number"]) -> None:
        self._copied: torch.cuda.Event | None = None
        if numbers.device.type != "cuda":
            self._numbers = numbers
            return
        # only pinned memory is written to without the host waiting
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._numbers.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self) -> list[int]:
        """Return the numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[int] = self._numbers.tolist()
        return numbers
