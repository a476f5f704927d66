"""The Triton programs that run on the GPU. `cuda` launches them; only it imports this module.

Every program sums in an order that follows from the shapes alone and uses no atomics, so
equal input gives equal bits. Sums are in float32, in float64 where DOUBLE.

`no_type_check` keeps the shape checker, which wraps functions, away from Triton's code.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def combine(
    weights,
    picked,
    starts,
    table,
    out,
    d,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Sum one segment's weighted rows, BLOCK_D columns of them."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    start, stop = tl.load(starts + segment), tl.load(starts + segment + 1)
    # BLOCK_E partial sums, added up at the end: no exchange between threads in the loop, and the
    # many rows of a hot segment lose less to rounding than in a single sum.
    sums = tl.zeros([BLOCK_E, BLOCK_D], tl.float64 if DOUBLE else tl.float32)
    for first in range(start, stop, BLOCK_E):
        entries = first + tl.arange(0, BLOCK_E)
        present = entries < stop
        weight = tl.load(weights + entries, present, other=0).to(sums.dtype)
        rows = tl.load(picked + entries, present, other=0).to(tl.int64)  # rows * d is large
        tile = tl.load(
            table + rows[:, None] * d + columns[None, :],
            present[:, None] & inside[None, :],
            other=0,
        )
        sums += weight[:, None] * tile.to(sums.dtype)
    total = tl.sum(sums, axis=0)
    tl.store(out + segment * d + columns, total.to(out.dtype.element_ty), inside)


@triton.jit
@no_type_check
def dots(
    x,
    table,
    starts,
    picked,
    parts,
    d,
    num_entries,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Multiply BLOCK_D columns of a row of x with those of its picked rows, into parts[stripe]."""
    row, stripe = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = stripe * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    start, stop = tl.load(starts + row), tl.load(starts + row + 1)
    here = tl.load(x + row * d + columns, inside, other=0).to(parts.dtype.element_ty)
    for first in range(start, stop, BLOCK_E):
        entries = first + tl.arange(0, BLOCK_E)
        present = entries < stop
        rows = tl.load(picked + entries, present, other=0).to(tl.int64)
        tile = tl.load(
            table + rows[:, None] * d + columns[None, :],
            present[:, None] & inside[None, :],
            other=0,
        )
        products = tl.sum(tile.to(here.dtype) * here[None, :], axis=1)
        tl.store(parts + stripe * num_entries + entries, products, present)


@triton.jit
@no_type_check
def project_rows(
    gradient,
    directions,
    num_rows,
    d,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Remove each gradient row's component along its direction; full rows, BLOCK_R of them."""
    wide: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (columns < d)[None, :]
    places = rows[:, None] * d + columns[None, :]
    g = tl.load(gradient + places, inside, other=0).to(wide)
    w = tl.load(directions + places, inside, other=0).to(wide)
    g -= tl.sum(g * w, axis=1)[:, None] * w
    tl.store(gradient + places, g.to(gradient.dtype.element_ty), inside)


@triton.jit
@no_type_check
def normalize_rows(
    directions,
    num_rows,
    d,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Divide full rows by their norms, BLOCK_R of them."""
    wide: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    present = rows < num_rows
    inside = present[:, None] & (columns < d)[None, :]
    places = rows[:, None] * d + columns[None, :]
    w = tl.load(directions + places, inside, other=0).to(wide)
    squares = tl.where(present, tl.sum(w * w, axis=1), 1.0)  # rows past the end: not 0 / 0
    w /= tl.sqrt(squares)[:, None]
    tl.store(directions + places, w.to(directions.dtype.element_ty), inside)
