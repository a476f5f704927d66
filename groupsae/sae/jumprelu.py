"""JumpReLU sparse autoencoder (Rajamanoharan et al., arXiv 2407.14435)."""

import math
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from groupsae.runtime.errors import UserError
from groupsae.sae.base import (
    SAE,
    GlobalBatch,
    SAEOutput,
    Size,
    SparseLatents,
    active_latents,
    ramp,
)
from groupsae.sae.checks import check_positive, check_share


class JumpReLU(SAE):
    """f(x)_i = z_i if z_i > theta_i, else 0, with z = W_enc (x - b_dec) + b_enc and theta > 0.

    Sparsity is driven to a chosen L0, as in the reference code: the penalty is
    coefficient * (L0 / target_l0 - 1)^2. A step has no gradient, so both the activation and the
    count of active latents get that of a step that is smoothed around the threshold.

    Args:
        target_l0: active latents per row that training aims at, on average.
        l0_coefficient: weight of the penalty.
        sparsity_warmup: share of the training in which the penalty rises from zero, linearly.
        threshold: initial threshold, in units of the scaled activations.
        bandwidth: width over which the step is smoothed, in the same units.
        **size: of `SAE`.

    Raises:
        UserError: a value that must be positive is not, or target_l0 exceeds the latents.

    >>> sae = JumpReLU(d_model=64, d_sae=1024, target_l0=8)
    >>> sae.decode(sae.encode(torch.randn(10, 64))).shape
    torch.Size([10, 64])
    """

    terms = ("fvu", "sparsity")
    kept_wide = 2.2

    def __init__(
        self,
        *,
        target_l0: float = 128,
        l0_coefficient: float = 1.0,
        sparsity_warmup: float = 0.1,
        threshold: float = 0.03,
        bandwidth: float = 0.03,
        **size: Unpack[Size],
    ) -> None:
        super().__init__(**size)
        check_positive(
            l0_coefficient=l0_coefficient,
            target_l0=target_l0,
            threshold=threshold,
            bandwidth=bandwidth,
        )
        check_share("sparsity_warmup", sparsity_warmup)
        if target_l0 > self.d_sae:
            raise UserError(
                f"sae.target_l0 is {target_l0}; it must be at most the {self.d_sae} latents."
            )
        self.target_l0, self.l0_coefficient = target_l0, l0_coefficient
        self.sparsity_warmup, self.bandwidth = sparsity_warmup, bandwidth
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.log_threshold = nn.Parameter(torch.full((self.d_sae,), math.log(threshold)))

    def extra_repr(self) -> str:
        """Return the sizes and the target of training."""
        return f"{super().extra_repr()}, target_l0={self.target_l0}"

    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the latents above their thresholds."""
        pre_acts = self.pre_acts(x)
        return active_latents(pre_acts * (pre_acts > self.log_threshold.exp()))

    def grow_latents(self, factors: Float[Tensor, "d_sae"]) -> bool:
        """Multiply all latents and thresholds by factors."""
        self.W_enc.mul_(factors.unsqueeze(1))
        self.b_enc.mul_(factors)
        self.log_threshold.add_(factors.log())
        return True

    def forward(self, x: Float[Tensor, "batch d_model"], batch: GlobalBatch) -> SAEOutput:
        """Return reconstruction, latents and losses.

        Losses: fvu, and sparsity = coefficient * (L0 / target_l0 - 1)^2, with L0 the mean number
        of active latents over the global batch; each process has its share of the value, and the
        gradient for its own rows.
        """
        pre_acts = self.pre_acts_of(x, batch)
        acts, active = Jump.apply(pre_acts, self.log_threshold.exp(), self.bandwidth)
        reconstruction, share = self.x_hat_of(acts @ self.W_dec, batch), batch.share
        num_active = active.sum()
        excess = batch.all_sum(num_active.detach()) * share / max(1, len(x)) / self.target_l0 - 1
        slope = 2 * excess * share / max(1, len(x)) / self.target_l0
        penalty = share * excess.square() + slope * (num_active - num_active.detach())
        weight = ramp(0, self.l0_coefficient, self.sparsity_warmup, batch.progress)
        losses = {
            "fvu": (x - reconstruction).square().sum() / batch.total_variance,
            "sparsity": weight * penalty,
        }
        return SAEOutput(reconstruction, acts.detach(), losses)


class Jump(torch.autograd.Function):
    """z H(z - theta) and H(z - theta), with gradients in theta through a rectangular kernel.

    d/dtheta z H(z - theta) = -theta / eps on |z - theta| < eps / 2, and
    d/dtheta H(z - theta) = -1 / eps there (arXiv 2407.14435, equations 11 and 12).
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float
    ) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_sae"]]:
        """Return activations, and one where a latent is active."""
        gate = z > threshold
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * gate, gate.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad_acts: Tensor, grad_active: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of z and threshold."""
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        jump = torch.where(near, threshold * grad_acts + grad_active, 0)
        return grad_acts * (z > threshold), -jump.sum(dim=0) / ctx.bandwidth, None
