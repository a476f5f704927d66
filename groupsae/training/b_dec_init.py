"""The initial decoder bias of an SAE: zero, or a centre of the activations."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.runtime.errors import UserError, check_choice
from groupsae.sae.base import SAE, AllSum

STARTS = ("zero", "mean", "geometric_median")
ROUNDS, CLOSE = 100, 1e-5  # of Weiszfeld's algorithm; it stops when it moves less than this


@torch.no_grad()
def init_b_dec(
    sae: SAE,
    x: Float[Tensor, "batch d_model"],
    start: str,
    all_sum: AllSum,
    means: Mapping[int, Float[Tensor, "d_model"]],
) -> None:
    """Set the decoder's bias at the start of the training.

    Biases of single layers (`layer_bias` of the SAE) start at the means of their layers.

    Args:
        sae: an SAE with its bias at zero.
        x: this process's rows of the first batch, scaled.
        start: of a bias that layers share: `zero` (paper); `mean` of the layers' means; or
            `geometric_median` of the first batch, the point with the smallest sum of distances,
            which single rows of extreme norm do not pull away.
        all_sum: returns the sum of a tensor over all processes.
        means: layer -> mean of its scaled activations over the calibration text.

    Raises:
        UserError: there is no such start, or no means.
    """
    check_choice("b_dec_start", start, STARTS)
    if (start == "mean" or sae.own_biases) and not means:
        raise UserError(
            "b_dec_start=mean and biases of single layers start at the layers' mean activations: "
            "give them, means=."
        )
    if start == "geometric_median":
        sae.b_dec.copy_(_geometric_median(x, all_sum))
    elif start == "mean" or sae.own_biases:
        sae.b_dec.copy_(torch.stack(list(means.values())).mean(0))
    if sae.maps is not None and sae.maps.b_dec is not None:
        for layer, offset in zip(sae.maps.layers, sae.maps.b_dec, strict=True):
            offset.copy_(means[layer].to(sae.b_dec) - sae.b_dec)


def _geometric_median(
    x: Float[Tensor, "batch d_model"], all_sum: AllSum
) -> Float[Tensor, " d_model"]:
    """Return the geometric median of the rows of all processes, by Weiszfeld's algorithm."""
    x = x[x.isfinite().all(1)].double()  # NaN in one row would spread to all of the bias
    centre = _weighted_mean(x, torch.ones_like(x[:, 0]), all_sum)
    for _ in range(ROUNDS):
        weights = 1 / (x - centre).norm(dim=1).clamp_min(torch.finfo(x.dtype).eps)
        last, centre = centre, _weighted_mean(x, weights, all_sum)
        if (centre - last).norm() <= CLOSE * centre.norm():
            break
    return centre


def _weighted_mean(
    x: Float[Tensor, "batch d_model"], weights: Float[Tensor, " batch"], all_sum: AllSum
) -> Float[Tensor, " d_model"]:
    """Return the weighted mean of the rows of all processes; zero without rows."""
    total = all_sum(torch.cat([weights @ x, weights.sum().reshape(1)]))
    return total[:-1] / total[-1].clamp_min(torch.finfo(x.dtype).tiny)
