"""Which code runs where: decided by device, dtype and shape, the same on every process.

No timing decides, because ranks and resumed runs must add up in the same order.
"""

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from groupsae.runtime.compat import onednn_linear
from groupsae.sae.kernels import cpu, cuda, dense

DENSE_SHARE = 0.2  # share of active latents above which dense products win (benchmarks.kernels)
COLUMNS_PER_K = 16  # from here on two stages of top-k are faster on a CPU


def kernels_of(table: Tensor) -> ModuleType:
    """Return the kernels for the device of a table [n, d]: a module with `dense`'s functions."""
    if table.device.type == "cpu":
        return cpu
    return cuda if table.device.type == "cuda" and cuda.available() else dense


def kernels_for(table: Tensor, entries: int, rows: int) -> ModuleType:
    """Return the fastest kernels for this number of active latents."""
    return dense if entries > DENSE_SHARE * rows * len(table) else kernels_of(table)


@torch.no_grad()
def affine(
    x: Float[Tensor, "row d"], weight: Float[Tensor, "n d"], bias: Float[Tensor, "n"]
) -> Float[Tensor, "row n"]:
    """Return x W^T + b without gradients: the one dense product of a TopK step.

    In float32 on CPUs with AVX-512 by oneDNN: on AMD's it ran at twice the rate of MKL, torch's
    choice (440 against 211 GFLOP/s on two cores of Zen 5), with the same error; Intel's were not
    measured. With AVX2 both are alike.
    """
    if (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
    ):
        result: Tensor = onednn_linear(x, weight, bias)
        return result
    return F.linear(x, weight, bias)


def top_k(
    values: Float[Tensor, "row n"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """Return the k largest of each row and their columns, in no order.

    On a CPU in two stages: the k groups of columns with the largest maxima, then the k largest of
    their members. That is exact: any value outside of those groups has at least k above it.
    Measured: 12 against 16 ms at n 4,096 and k 32, 28 against 43 at n 12,288 and k 64.
    """
    columns = values.shape[1]
    size = group_size(columns, k) if values.device.type == "cpu" else 1
    if size == 1:
        return values.topk(k, dim=1, sorted=False)
    groups = values.unflatten(1, (size, columns // size))
    best = groups.amax(dim=1).topk(k, dim=1, sorted=False).indices
    members = groups.gather(2, best.unsqueeze(1).expand(-1, size, -1)).flatten(1)
    found, place = members.topk(k, dim=1, sorted=False)
    member, group = place // k, best.gather(1, place % k)
    return found, member * (columns // size) + group


def group_size(columns: int, k: int) -> int:
    """Return the power of two that divides the columns and is nearest to sqrt(n / k).

    There both stages together cost least.
    """
    if k == 0 or columns < COLUMNS_PER_K * k:
        return 1
    largest_divisor = columns & -columns  # among powers of two
    return min(largest_divisor, 2 ** round(math.log2(columns / k) / 2))
