"""The plain definition: a dense matrix with zeros where nothing is active.

Right on every device, and the fastest where a large share of the latents is active.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groupsae.sae.kernels.bookkeeping import rows_of


def combine(
    weights: Float[Tensor, "entry"],
    picked: Int[Tensor, "entry"],
    starts: Int[Tensor, "bound"],
    table: Float[Tensor, "row d"],
) -> Float[Tensor, "segment d"]:
    """Return for each segment the sum of weights[e] * table[picked[e]] over its entries."""
    matrix = weights.new_zeros(len(starts) - 1, len(table))
    matrix.index_put_((rows_of(starts, len(picked)), picked), weights, accumulate=True)
    return matrix @ table


def dots(
    x: Float[Tensor, "row d"],
    table: Float[Tensor, "n d"],
    starts: Int[Tensor, "bound"],
    picked: Int[Tensor, "entry"],
) -> Float[Tensor, "entry"]:
    """Return x[row of e] . table[picked[e]] for each entry."""
    return (x @ table.T)[rows_of(starts, len(picked)), picked]


def project_rows(gradient: Float[Tensor, "n d"], directions: Float[Tensor, "n d"]) -> None:
    """Remove from each row its part along a unit vector, in place: g -= (g . w) w."""
    along = torch.linalg.vecdot(gradient, directions).unsqueeze(1)
    gradient.addcmul_(along, directions, value=-1)


def normalize_rows(directions: Float[Tensor, "n d"]) -> None:
    """Give each row unit norm, in place."""
    directions.div_(directions.norm(dim=1, keepdim=True))
