"""Gated sparse autoencoder (Rajamanoharan et al., arXiv 2404.16014)."""

from typing import Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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


class Gated(SAE):
    """f = 1[gate > 0] ReLU(mag): one answer for which latents are active, one for how strongly.

    gate = W_enc (x - b_dec) + b_gate and mag = exp(r_mag) W_enc (x - b_dec) + b_mag share their
    weights. L1 acts on the gate only, so it does not shrink the activations.

    Args:
        l1_coefficient: weight of the penalty on the gate.
        sparsity_warmup: share of the training in which the penalty rises from zero, linearly.
        **size: of `SAE`.

    >>> sae = Gated(d_model=64, d_sae=1024)
    >>> sae.decode(sae.encode(torch.randn(10, 64))).shape
    torch.Size([10, 64])
    """

    terms = ("fvu", "sparsity", "gate")
    kept_wide = 4.5

    def __init__(
        self, *, l1_coefficient: float = 0.1, sparsity_warmup: float = 0.1, **size: Unpack[Size]
    ) -> None:
        super().__init__(**size)
        check_positive(l1_coefficient=l1_coefficient)
        check_share("sparsity_warmup", sparsity_warmup)
        self.l1_coefficient, self.sparsity_warmup = l1_coefficient, sparsity_warmup
        self.b_gate = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))

    def extra_repr(self) -> str:
        """Return the sizes and the weight of the penalty."""
        return f"{super().extra_repr()}, l1_coefficient={self.l1_coefficient}"

    def pre_acts(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Return W_enc (x - b_dec), which gate and magnitude share."""
        return F.linear(x, self.W_enc, torch.zeros_like(self.b_gate) - self.W_enc @ self.b_dec)

    def gate_and_acts(
        self, shared: Float[Tensor, "batch d_sae"]
    ) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_sae"]]:
        """Return the gate after ReLU, and all latents, for `pre_acts`."""
        gate, magnitude = shared + self.b_gate, shared * self.r_mag.exp() + self.b_mag
        return gate.relu(), magnitude.relu() * (gate > 0)

    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the active latents."""
        return active_latents(self.gate_and_acts(self.pre_acts(x))[1])

    def shift_pre_acts(self, offset: Float[Tensor, "d_sae"]) -> None:
        """Change the biases of gate and magnitude so that what they share grows by an offset."""
        self.b_gate.add_(offset)
        self.b_mag.add_(self.r_mag.exp() * offset)

    def grow_latents(self, factors: Float[Tensor, "d_sae"]) -> bool:
        """Multiply the magnitudes by factors."""
        self.r_mag.add_(factors.log())
        self.b_mag.mul_(factors)
        return True

    def forward(self, x: Float[Tensor, "batch d_model"], batch: GlobalBatch) -> SAEOutput:
        """Return reconstruction, latents and losses.

        Losses: fvu; sparsity = coefficient * sum ReLU(gate) / total_variance; and gate, the fvu of
        decoding ReLU(gate) with a decoder that this term does not train, from which the gate
        learns which latents to let pass.
        """
        gate, acts = self.gate_and_acts(self.pre_acts_of(x, batch))
        reconstruction, total = self.x_hat_of(acts @ self.W_dec, batch), batch.total_variance
        through_gate = self.x_hat_of(gate @ self.W_dec.detach(), batch, frozen=True)
        weight = ramp(0, self.l1_coefficient, self.sparsity_warmup, batch.progress)
        losses = {
            "fvu": (x - reconstruction).square().sum() / total,
            "sparsity": weight * gate.sum() / total,
            "gate": (x - through_gate).square().sum() / total,
        }
        return SAEOutput(reconstruction, acts.detach(), losses)

    def training_flops(self) -> int:
        """Return the FLOPs per token of a training step: dense, and decoding the gate, 14 d n.

        And what `maps_flops` adds; the decoded gate passes a map too, which it does not train.
        """
        frozen = 0 if self.maps is None else 8 * self.d_model * self.layer_rank
        return 14 * self.d_model * self.d_sae + self.maps_flops(self.d_sae) + frozen
