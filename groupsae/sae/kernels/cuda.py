"""The kernels of CUDA, by Triton programs.

Triton comes with the CUDA builds of torch. It is imported at the first launch, so this module can
be imported anywhere.

Blocks follow from shapes and element sizes, not from timing: ranks and resumed runs must add up in
the same order. Rows are gathered in stripes of a few hundred bytes, all segments of one stripe
before those of the next, which spreads a hot latent (one with an entry in every row of the batch)
over d * size / 256 programs. The stripes were also meant to stay in the L2 cache; on an H200 they
do not yet (docs/performance.md).
"""

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

COMBINE_BYTES = 256  # of a row that one program of `combine` reads
DOTS_BYTES = 512  # the same of `dots`, which writes partial sums, one for each stripe


@cache
def available() -> bool:
    """Return whether Triton is installed in a version that was tested, 3.6 or newer."""
    if find_spec("triton") is None:
        return False
    major, minor = version("triton").split(".")[:2]
    return (int(major), int(minor)) >= (3, 6)


def combine(
    weights: Float[Tensor, "entry"],
    picked: Int[Tensor, "entry"],
    starts: Int[Tensor, "bound"],
    table: Float[Tensor, "row d"],
) -> Float[Tensor, "segment d"]:
    """Return the weighted sum of the picked rows of each segment, as `dense.combine`.

    Accumulated in float32 (float64 if that is the result's dtype).
    """
    segments, d = len(starts) - 1, table.shape[1]
    dtype = torch.promote_types(weights.dtype, table.dtype)
    out = torch.empty(segments, d, dtype=dtype, device=table.device)
    block = _block(d, COMBINE_BYTES // table.element_size())
    if out.numel():
        tensors = (tensor.contiguous() for tensor in (weights, picked, starts, table))
        blocks = {"BLOCK_E": 64, "BLOCK_D": block, "DOUBLE": dtype == torch.float64}
        _launch("combine", (segments, -(-d // block)), *tensors, out, d, num_warps=4, **blocks)
    return out


def dots(
    x: Float[Tensor, "row d"],
    table: Float[Tensor, "n d"],
    starts: Int[Tensor, "bound"],
    picked: Int[Tensor, "entry"],
) -> Float[Tensor, "entry"]:
    """Return the product of each entry's row of `x` with its row of `table`, as `dense.dots`.

    Accumulated in float32 (float64 if that is the result's dtype).
    """
    (num_rows, d), num_entries = x.shape, len(picked)
    dtype = torch.promote_types(x.dtype, table.dtype)
    block = _block(d, DOTS_BYTES // table.element_size())
    stripes = -(-d // block)
    sums = torch.promote_types(dtype, torch.float32)
    parts = torch.empty(stripes, num_entries, dtype=sums, device=x.device)
    if parts.numel():
        tensors = (tensor.contiguous() for tensor in (x, table, starts, picked))
        blocks = {"BLOCK_E": 32, "BLOCK_D": block}
        grid = (num_rows, stripes)
        _launch("dots", grid, *tensors, parts, d, num_entries, num_warps=4, **blocks)
    return (parts[0] if stripes == 1 else parts.sum(dim=0)).to(dtype)


def project_rows(gradient: Float[Tensor, "n d"], directions: Float[Tensor, "n d"]) -> None:
    """Remove from each row its part along a direction, in place: g -= (g . w) w.

    Autograd does not see it, nor `normalize_rows`.
    """
    assert gradient.is_contiguous()
    if gradient.numel():
        grid, blocks = _full_rows(gradient)
        tensors = gradient, directions.contiguous()
        _launch("project_rows", grid, *tensors, *gradient.shape, **blocks)


def normalize_rows(directions: Float[Tensor, "n d"]) -> None:
    """Give each row unit norm, in place. A row of zeros becomes NaN, as in torch."""
    assert directions.is_contiguous()
    if directions.numel():
        grid, blocks = _full_rows(directions)
        _launch("normalize_rows", grid, directions, *directions.shape, **blocks)


def _launch(program: str, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a Triton program on the device of its first argument."""
    from groupsae.sae.kernels import triton_programs

    with torch.cuda.device_of(arguments[0]):
        getattr(triton_programs, program)[grid](*arguments, **options)


def _block(d: int, most: int) -> int:
    """Return the power of two that holds d columns, between 16 and `most`."""
    return min(max(16, 1 << (d - 1).bit_length()), most)


def _full_rows(matrix: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Return grid and blocks of a pass over full rows: 2,048 elements a program, or one row."""
    rows, d = matrix.shape
    block = max(16, 1 << (d - 1).bit_length())
    rows_each = max(1, 2048 // block)
    return (-(-rows // rows_each),), {
        "BLOCK_R": rows_each,
        "BLOCK_D": block,
        "DOUBLE": matrix.dtype == torch.float64,
        "num_warps": min(max(rows_each * block // 512, 4), 16),
    }
