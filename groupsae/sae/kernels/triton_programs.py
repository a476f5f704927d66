"""What runs on the GPU: Triton programs for the sparse sums, for passes over rows and for top-k.

`cuda` launches them and says what they compute; only it imports this module, since it needs
Triton. Every program sums in an order that follows from the shapes alone and uses no atomics, so
equal input gives equal bits. Sums are in float32, in float64 where DOUBLE.

`no_type_check` keeps the checkers of types and shapes, which wrap functions, away from a source
text that Triton compiles.
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
    # BLOCK_E sums side by side, added up at the end: no exchange between threads in the loop, and
    # the many rows of a hot segment lose less to rounding than in a single sum.
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
    """Remove each gradient row's component along its direction; whole rows, BLOCK_R of them."""
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
    """Divide whole rows by their norms, BLOCK_R of them."""
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


@triton.jit
@no_type_check
def _maxima(x, columns, n, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Return for each column c the largest of x[c], x[c + BLOCK], ..., as float32."""
    best = tl.load(x + columns, columns < n, other=float("-inf")).to(tl.float32)
    for member in tl.static_range(1, GROUP):
        more = columns + member * BLOCK
        other = tl.load(x + more, more < n, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, other)
    return best


@triton.jit
@no_type_check
def _keys(values, SPARE: tl.constexpr):
    """Return integers that are ordered as the float32 values are.

    These are their bits, those below the sign turned over where it is set. The lowest SPARE ones
    are left out: they are empty in what was half precision.
    """
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SPARE


@triton.jit
@no_type_check
def top_k(
    x,
    values,
    indices,
    n,
    k,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SPARE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Find the k columns of one row with the largest maxima, column c over c, c + BLOCK, ...

    With GROUP = 1 these are the k largest entries. The k-th largest is built up bit by bit, from
    the highest: a bit is set if at least k keys are no smaller. The keys stay in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    x, values, indices = x + row * n, values + row * k, indices + row * k
    keys = _keys(_maxima(x, tl.arange(0, BLOCK), n, BLOCK, GROUP), SPARE)
    least = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= k, 0, -(2 ** (31 - SPARE)))
    least = least.to(tl.int32)
    for step in range(31 - SPARE):
        higher = least + (1 << (30 - SPARE - step))
        least = tl.where(tl.sum((keys >= higher).to(tl.int32), axis=0) >= k, higher, least)
    missing = k - tl.sum((keys > least).to(tl.int32), axis=0)
    # Write out what is larger and the first `missing` that are equal. The row is read again, from
    # the cache and in chunks: a running sum over all of it would need more registers than there
    # are. One sum counts both, the larger ones in its low half and the equal ones in the high.
    before = 0
    for first in range(0, BLOCK, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        best = _maxima(x, columns, n, BLOCK, GROUP)
        some = _keys(best, SPARE)
        marks = tl.where(some > least, 1, tl.where(some == least, 1 << 16, 0))
        counts = before + tl.cumsum(marks, axis=0)
        equal = counts >> 16
        kept = (some > least) | ((some == least) & (equal <= missing))
        slots = (counts & 0xFFFF) + tl.minimum(equal, missing) - 1
        tl.store(values + slots, best.to(values.dtype.element_ty), kept)
        tl.store(indices + slots, columns.to(tl.int64), kept)
        before += tl.sum(marks, axis=0)
