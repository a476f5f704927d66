"""The definition of the kernels: a dense matrix with zeros where no latent is active.

Correct on every device, and the fastest where a large share of the latents is active.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rows_of(starts: Int[Tensor, "bound"], count: int) -> Int[Tensor, "entry"]:
    """Return the row of each of `count` entries; does not wait for the device."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return rows.repeat_interleave(starts.diff(), output_size=count)


def combine(
    weights: Float[Tensor, "entry"],
    picked: Int[Tensor, "entry"],
    starts: Int[Tensor, "bound"],
    table: Float[Tensor, "row d"],
) -> Float[Tensor, "segment d"]:
    """Return the weighted sum of the picked rows of each segment.

    out[s] = sum_e weights[e] * table[picked[e]] over starts[s] <= e < starts[s + 1]; zeros for an
    empty segment.
    """
    matrix = weights.new_zeros(len(starts) - 1, len(table))
    matrix.index_put_((rows_of(starts, len(picked)), picked), weights, accumulate=True)
    return matrix @ table


def dots(
    x: Float[Tensor, "row d"],
    table: Float[Tensor, "n d"],
    starts: Int[Tensor, "bound"],
    picked: Int[Tensor, "entry"],
) -> Float[Tensor, "entry"]:
    """Return x[r] . table[picked[e]] of each entry, starts[r] <= e < starts[r + 1]."""
    return (x @ table.T)[rows_of(starts, len(picked)), picked]


def project_rows(gradient: Float[Tensor, "n d"], directions: Float[Tensor, "n d"]) -> None:
    """Remove from each row its part along a unit vector, in place: g -= (g . w) w."""
    along = torch.linalg.vecdot(gradient, directions).unsqueeze(1)
    gradient.addcmul_(along, directions, value=-1)


def normalize_rows(directions: Float[Tensor, "n d"]) -> None:
    """Give each row unit norm, in place."""
    directions.div_(directions.norm(dim=1, keepdim=True))
