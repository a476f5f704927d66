"""ReLU sparse autoencoder with an L1 penalty (Bricken et al. 2023; Conerly et al. 2024)."""

from typing import Unpack

import torch
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


class ReLU(SAE):
    """f(x) = ReLU(W_enc (x - b_dec) + b_enc), kept sparse by L1.

    The penalty weighs each activation with its decoder row's norm, so shrinking activations and
    growing the decoder instead gains nothing. The norms are therefore free within a step; after
    it they are folded into the encoder, which changes neither reconstruction nor loss.

    Args:
        l1_coefficient: weight of the penalty.
        sparsity_warmup: share of the training in which the penalty rises from zero, linearly.
        **size: of `SAE`.

    >>> sae = ReLU(d_model=64, d_sae=1024)
    >>> sae.decode(sae.encode(torch.randn(10, 64))).shape
    torch.Size([10, 64])
    """

    terms = ("fvu", "sparsity")
    normalized: tuple[str, ...] = ("W_dec", "W_enc", "b_enc")
    kept_wide = 1.2

    def __init__(
        self, *, l1_coefficient: float = 0.1, sparsity_warmup: float = 0.1, **size: Unpack[Size]
    ) -> None:
        super().__init__(**size)
        check_positive(l1_coefficient=l1_coefficient)
        check_share("sparsity_warmup", sparsity_warmup)
        self.l1_coefficient, self.sparsity_warmup = l1_coefficient, sparsity_warmup
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        if self.maps is not None and self.maps.b_enc is not None:
            self.normalized = (*self.normalized, "maps.b_enc")

    def extra_repr(self) -> str:
        """Return the sizes and the weight of the penalty."""
        return f"{super().extra_repr()}, l1_coefficient={self.l1_coefficient}"

    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the latents above zero."""
        return active_latents(self.pre_acts(x).relu())

    def forward(self, x: Float[Tensor, "batch d_model"], batch: GlobalBatch) -> SAEOutput:
        """Return reconstruction, latents and losses.

        Losses: fvu, and sparsity = coefficient * sum f_i |W_dec,i| / total_variance.
        """
        acts, total = self.pre_acts_of(x, batch).relu(), batch.total_variance
        reconstruction = self.x_hat_of(acts @ self.W_dec, batch)
        weight = ramp(0, self.l1_coefficient, self.sparsity_warmup, batch.progress)
        losses = {
            "fvu": (x - reconstruction).square().sum() / total,
            "sparsity": weight * (acts.sum(dim=0) @ self.W_dec.norm(dim=1)) / total,
        }
        return SAEOutput(reconstruction, acts.detach(), losses)

    def project_gradient(self) -> None:
        """Leave the gradient unchanged: the norms are free within a step."""

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Fold the decoder's norms into the encoder."""
        norms = self.W_dec.norm(dim=1)
        self.W_dec.div_(norms.unsqueeze(1))
        self.grow_latents(norms)

    def grow_latents(self, factors: Float[Tensor, "d_sae"]) -> bool:
        """Multiply all latents by factors."""
        self.W_enc.mul_(factors.unsqueeze(1))
        self.b_enc.mul_(factors)
        if self.maps is not None and self.maps.b_enc is not None:
            self.maps.b_enc.mul_(factors)
        return True
