"""The kernels of a CPU, by torch's own operators: only the rows of active latents are read.

At the sizes of real SAEs they are 3 to 40 times faster than dense products
(docs/performance.md); a gather and a batched product are slower than either.
"""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from groupsae.sae.kernels.dense import normalize_rows, project_rows

__all__ = ["combine", "dots", "normalize_rows", "project_rows"]

with warnings.catch_warnings():  # torch warns once, at the first use: "in beta state"
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))


def combine(
    weights: Float[Tensor, "entry"],
    picked: Int[Tensor, "entry"],
    starts: Int[Tensor, "bound"],
    table: Float[Tensor, "row d"],
) -> Float[Tensor, "segment d"]:
    """Return the weighted sum of the picked rows of each segment, as `dense.combine`."""
    return F.embedding_bag(
        picked, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def dots(
    x: Float[Tensor, "row d"],
    table: Float[Tensor, "n d"],
    starts: Int[Tensor, "bound"],
    picked: Int[Tensor, "entry"],
) -> Float[Tensor, "entry"]:
    """Return the result of `dense.dots`, if no row picks the same entry twice."""
    wanted = torch.sparse_csr_tensor(
        starts, picked, x.new_zeros(len(picked)), (len(x), len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(wanted, x, table.T, beta=0.0).values()
