"""The sparse sums on CUDA, by Triton programs.

Triton comes with the CUDA builds of torch. It is imported at the first launch, so that this module
can be imported, and `available` asked, anywhere.

Blocks follow from shapes and element sizes, not from timing: ranks and resumed runs must add up in
the same order. Rows are gathered in stripes of a few hundred bytes, all segments of one stripe
before those of the next (the first axis of a grid runs fastest): a stripe of the table, such as
8 MiB of 32,768 rows of 256 bytes, stays in the L2 cache of an A100 or H100, while the whole table
(256 MiB at d_model 2,048) does not. It also spreads a hot latent, which can have an entry in every
row of the batch, over d * size / 256 programs. (Reasoned from sizes, and from the registers that
compiling reports. On an H200 the sums take about what fetching every row from memory takes, so the
stripes do not yet stay in its cache: docs/performance.md.)
"""

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

COMBINE_BYTES = 256  # of a row that one program of `combine` reads
DOTS_BYTES = 512  # the same of `dots`, whose partial sums, one for each stripe, are written out
MOST_IN_REGISTERS = 16_384  # keys of a row in `top_k`; 512 threads hold 32 each
SPARE_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # empty ones in a float32


@cache
def available() -> bool:
    """Return whether the programs can be built: a Triton that they were tried with is there.

    Which is 3.6 or newer; the device is not asked. Older ones come with torch before 2.11.
    """
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
    """Return the weighted sum of the picked rows of each segment.

    out[s] = sum_e weights[e] * table[picked[e]] over starts[s] <= e < starts[s + 1]; an empty
    segment gives zeros. Accumulated in float32 (float64 if that is the result's type).

    Args:
        weights: of the entries.
        picked: row of `table` for each entry.
        starts: first entry of each segment, and the number of entries.
        table: the rows.
    """
    from groupsae.sae.kernels import triton_programs

    segments, d = len(starts) - 1, table.shape[1]
    dtype = torch.promote_types(weights.dtype, table.dtype)
    out = torch.empty(segments, d, dtype=dtype, device=table.device)
    block = _block(d, COMBINE_BYTES // table.element_size())
    if out.numel():
        with torch.cuda.device_of(table):
            triton_programs.combine[(segments, -(-d // block))](
                *_plain(weights, picked, starts, table),
                out,
                d,
                BLOCK_E=64,
                BLOCK_D=block,
                DOUBLE=dtype == torch.float64,
                num_warps=4,
            )
    return out


def dots(
    x: Float[Tensor, "row d"],
    table: Float[Tensor, "n d"],
    starts: Int[Tensor, "bound"],
    picked: Int[Tensor, "entry"],
) -> Float[Tensor, "entry"]:
    """Return the inner product of each entry's row of `x` with its picked row of `table`.

    out[e] = x[r] . table[picked[e]] for starts[r] <= e < starts[r + 1]. Accumulated in float32
    (float64 if that is the result's type).

    Args:
        x: one row for each segment of entries.
        table: the rows that entries pick.
        starts: first entry of each row of `x`, and the number of entries.
        picked: row of `table` for each entry.
    """
    from groupsae.sae.kernels import triton_programs

    (num_rows, d), num_entries = x.shape, len(picked)
    dtype = torch.promote_types(x.dtype, table.dtype)
    block = _block(d, DOTS_BYTES // table.element_size())
    stripes = -(-d // block)
    sums = torch.promote_types(dtype, torch.float32)
    parts = torch.empty(stripes, num_entries, dtype=sums, device=x.device)
    if parts.numel():
        with torch.cuda.device_of(x):
            triton_programs.dots[(num_rows, stripes)](
                *_plain(x, table, starts, picked),
                parts,
                d,
                num_entries,
                BLOCK_E=32,
                BLOCK_D=block,
                num_warps=4,
            )
    return (parts[0] if stripes == 1 else parts.sum(dim=0)).to(dtype)


def project_rows(gradient: Float[Tensor, "n d"], directions: Float[Tensor, "n d"]) -> None:
    """Remove from each row its component along a direction, in place: g -= (g . w) w.

    Directions are taken as they are: only for unit vectors is the rest orthogonal to them. Behind
    autograd's back, like `normalize_rows`.
    """
    from groupsae.sae.kernels import triton_programs

    assert gradient.is_contiguous()
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            grid, blocks = _whole_rows(gradient)
            triton_programs.project_rows[grid](
                gradient, directions.contiguous(), *gradient.shape, **blocks
            )


def normalize_rows(directions: Float[Tensor, "n d"]) -> None:
    """Give each row unit norm, in place: w /= |w|. A row of zeros becomes NaN, as in torch."""
    from groupsae.sae.kernels import triton_programs

    assert directions.is_contiguous()
    if directions.numel():
        with torch.cuda.device_of(directions):
            grid, blocks = _whole_rows(directions)
            triton_programs.normalize_rows[grid](directions, *directions.shape, **blocks)


def top_k(
    pre_acts: Float[Tensor, "row n"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """Return the k largest entries of each row and their columns, in no order of size.

    Not used in training yet: no GPU has said whether it is faster than torch's own
    (`python -m benchmarks.kernels device=cuda` asks one).

    Exact. Which of several entries equal to the k-th largest are kept depends on the row alone
    (for up to 16,384 columns: the first). -0.0 is below 0.0, and NaN is not ordered as in torch.

    Longer rows are folded into at most 16,384 groups of columns; the k groups with the largest
    maxima contain k largest entries, since any entry outside has k maxima that are no smaller.
    `torch.topk` does what does not fit: float64, and k times group size above 16,384.
    """
    n = pre_acts.shape[1]
    group = -(-n // MOST_IN_REGISTERS)
    if pre_acts.dtype not in SPARE_BITS or k * group > MOST_IN_REGISTERS:
        return pre_acts.topk(k, dim=1, sorted=False)
    values, columns = _select(pre_acts, k, group)
    if group == 1:
        return values, columns
    members = MOST_IN_REGISTERS * torch.arange(group, device=pre_acts.device)
    # first members first: all of them exist, so that of entries equal to -inf none past n is taken
    candidates = (members[:, None] + columns[:, None, :]).flatten(1)
    values = pre_acts.gather(1, candidates.clamp(max=n - 1))
    values, places = _select(values.masked_fill_(candidates >= n, -torch.inf), k, 1)
    return values, candidates.gather(1, places)


def _select(pre_acts: Tensor, k: int, group: int) -> tuple[Tensor, Tensor]:
    """Return maxima and numbers of the k best groups; a group is `group` columns, far apart."""
    from groupsae.sae.kernels import triton_programs

    rows, n = pre_acts.shape
    values = pre_acts.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.int64, device=pre_acts.device)
    block = MOST_IN_REGISTERS if group > 1 else _block(n, MOST_IN_REGISTERS)
    if indices.numel():
        with torch.cuda.device_of(pre_acts):
            triton_programs.top_k[(rows,)](
                *_plain(pre_acts, values, indices),
                n,
                k,
                BLOCK=block,
                GROUP=group,
                SPARE=SPARE_BITS[pre_acts.dtype],
                CHUNK=min(block, 2048),
                num_warps=min(max(block // 1024, 4), 16),
            )
    return values, indices


def _plain(*tensors: Tensor) -> list[Tensor]:
    """Return tensors whose elements lie as the programs read them, copied only if they do not."""
    return [tensor.contiguous() for tensor in tensors]


def _block(d: int, most: int) -> int:
    """Return the power of two that holds d columns, between 16 and `most`."""
    return min(max(16, 1 << (d - 1).bit_length()), most)


def _whole_rows(matrix: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Return grid and blocks of a pass over whole rows: 2,048 elements a program, or one row."""
    rows, d = matrix.shape
    block = max(16, 1 << (d - 1).bit_length())
    together = max(1, 2048 // block)
    return (-(-rows // together),), {
        "BLOCK_R": together,
        "BLOCK_D": block,
        "DOUBLE": matrix.dtype == torch.float64,
        "num_warps": min(max(together * block // 512, 4), 16),
    }
