"""Which kernels to use: decided by device and shape, the same on every process."""

from types import ModuleType

from torch import Tensor

from groupsae.sae.kernels import cpu, cuda, dense

DENSE_SHARE = 0.2  # of all latents active: from here on dense products win (benchmarks.kernels)


def kernels_of(table: Tensor) -> ModuleType:
    """Return the module of this room for the device that a table [n, d] is on.

    All have the same functions; `dense` says what they mean.
    """
    if table.device.type == "cpu":
        return cpu
    return cuda if table.device.type == "cuda" and cuda.available() else dense


def kernels_for(table: Tensor, entries: int, rows: int) -> ModuleType:
    """Return the module that is fastest for so many active latents.

    Args:
        table: the decoder or encoder, [n, d].
        entries: active latents in all rows.
        rows: of the batch.
    """
    return dense if entries > DENSE_SHARE * rows * len(table) else kernels_of(table)
