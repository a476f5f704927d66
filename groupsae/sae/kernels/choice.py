"""Which kernels to use: decided by device and shape, the same on every process."""

import importlib.util
from types import ModuleType

from torch import Tensor

from groupsae.sae.kernels import cpu, dense

DENSE_SHARE = 0.25  # of all latents active: from here on dense products win (docs/performance.md)


def kernels_for(table: Tensor, entries: int, rows: int) -> ModuleType:
    """Return the module of this room that is fastest for so many entries.

    All have the same two functions, `combine` and `dots`; `dense` says what they mean.

    Args:
        table: the decoder or encoder, [n, d].
        entries: active latents in all rows.
        rows: of the batch.
    """
    if entries > DENSE_SHARE * rows * len(table):
        return dense
    if table.device.type == "cpu":
        return cpu
    if table.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from groupsae.sae.kernels import cuda

        return cuda
    return dense
