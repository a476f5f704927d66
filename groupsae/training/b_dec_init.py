"""The initial decoder bias of an SAE: zero, or a centre of the first batch."""

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.runtime.errors import check_choice
from groupsae.sae.base import SAE, AllSum

STARTS = ("zero", "mean", "geometric_median")
ROUNDS, CLOSE = 100, 1e-5  # of Weiszfeld's algorithm; it stops when it moves less than this


@torch.no_grad()
def init_b_dec(sae: SAE, x: Float[Tensor, "batch d_model"], start: str, all_sum: AllSum) -> None:
    """Set the decoder's bias from the scaled activations of the first batch.

    Args:
        sae: an SAE with its bias at zero.
        x: this process's rows.
        start: `zero` (paper), `mean`, or `geometric_median`, the point with the smallest sum of
            distances, which single rows of extreme norm do not pull away.
        all_sum: returns the sum of a tensor over all processes.

    Raises:
        UserError: there is no such start.
    """
    check_choice("b_dec_start", start, STARTS)
    if start == "zero":
        return
    x = x[x.isfinite().all(1)].double()  # NaN in one row would spread to all of the bias
    centre = _weighted_mean(x, torch.ones_like(x[:, 0]), all_sum)
    for _ in range(ROUNDS if start == "geometric_median" else 0):
        weights = 1 / (x - centre).norm(dim=1).clamp_min(torch.finfo(x.dtype).eps)
        last, centre = centre, _weighted_mean(x, weights, all_sum)
        if (centre - last).norm() <= CLOSE * centre.norm():
            break
    sae.b_dec.copy_(centre)


def _weighted_mean(
    x: Float[Tensor, "batch d_model"], weights: Float[Tensor, " batch"], all_sum: AllSum
) -> Float[Tensor, " d_model"]:
    """Return the weighted mean of the rows of all processes; zero without rows."""
    total = all_sum(torch.cat([weights @ x, weights.sum().reshape(1)]))
    return total[:-1] / total[-1].clamp_min(torch.finfo(x.dtype).tiny)
