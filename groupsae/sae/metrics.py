"""Reconstruction quality per layer, from sums that are right over batches and processes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from groupsae.sae.base import SparseLatents


class Reconstruction(Metric):
    """FVU, L0 and which latents fired, over all batches since the last reset.

    fvu = sum |x - x_hat|^2 / sum |x - mean|^2 with the mean over all batches, in float64;
    l0 = mean number of latents above zero. `sync_on_compute` sums over all processes; False where
    one of them sees all batches.
    """

    full_state_update = False
    squared_error: Tensor
    sum_x: Tensor
    sum_squares: Tensor
    active: Tensor
    count: Tensor
    fired: Tensor

    def __init__(self, *, d_model: int, d_sae: int, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        for name in ("squared_error", "sum_squares", "active", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum_x", torch.zeros(d_model, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fired", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        x: Float[Tensor, "batch d_model"],
        x_hat: Float[Tensor, "batch d_model"],
        latents: SparseLatents,
    ) -> None:
        """Add a batch of activations and their reconstructions."""
        active = latents.acts > 0
        self.squared_error += (x - x_hat).double().square().sum()
        self.sum_x += x.double().sum(0)
        self.sum_squares += x.double().square().sum()
        self.active += active.sum()
        self.count += len(x)
        self.fired += torch.bincount(latents.indices[active], minlength=len(self.fired))

    def compute(self) -> dict[str, Tensor]:
        """Return fvu, l0 and the boolean mask of latents that fired."""
        variance = self.sum_squares - self.sum_x.square().sum() / self.count
        return {
            "fvu": self.squared_error / variance,
            "l0": self.active / self.count,
            "fired": self.fired > 0,
        }
