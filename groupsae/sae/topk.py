"""TopK sparse autoencoder with AuxK (Gao et al., arXiv 2406.04093; paper appendix A and B)."""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from groupsae.errors import UserError
from groupsae.sae.base import SAE, AllSum, SAEOutput, SparseLatents, linear_pre_acts, same
from groupsae.sae.schedule import check_count, check_positive, check_share, is_number, ramp


class TopK(SAE):
    """f(x) = TopK(ReLU(W_enc (x - b_dec) + b_enc)).

    Departures from the reference code, on purpose: AuxK predicts x - x_hat (not its negative),
    detached, without the decoder bias; a latent fired only if its activation is above zero; the
    decoder is normalised after the step, not before the next one.

    Args:
        k: active latents per row.
        k_start: active latents at the start of training; null: k.
        sparsity_warmup: share of the training in which k_start goes over to k, linearly.
        auxk_alpha: weight of the AuxK term (paper: 1/32); 0 switches it off.
        auxk_share: AuxK uses up to auxk_share * d_model dead latents (0.5, as Gao et al. and the
            reference code do; the paper's text says half of d_sae).
        **size: of `SAE`.

    Raises:
        UserError: k or k_start is not between 1 and the number of latents.
    """

    terms: ClassVar[tuple[str, ...]] = ("fvu", "auxk")
    kept_wide = 0.0  # the k active latents a row are small beside the weights

    def __init__(
        self,
        *,
        k: int,
        k_start: int | None,
        sparsity_warmup: float,
        auxk_alpha: float,
        auxk_share: float,
        **size: Any,
    ) -> None:
        super().__init__(**size)
        check_share("sparsity_warmup", sparsity_warmup)
        check_count("k", k, self.d_sae)
        check_count("k_start", k if k_start is None else k_start, self.d_sae)
        check_positive(auxk_share=auxk_share)
        if not is_number(auxk_alpha) or auxk_alpha < 0:
            raise UserError(f"sae.auxk_alpha is {auxk_alpha!r}; it must be at least 0.")
        self.k, self.k_start, self.sparsity_warmup = k, k_start or k, sparsity_warmup
        self.auxk_alpha, self.max_auxk = auxk_alpha, max(1, round(auxk_share * self.d_model))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    def pre_acts(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Return W_enc (x - b_dec) + b_enc."""
        return linear_pre_acts(x, self, self.b_enc)

    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the k largest latents of each row."""
        return largest(self.pre_acts(x), self.k)

    def k_at(self, progress: float) -> int:
        """Return the number of active latents after a share of the training."""
        return round(ramp(self.k_start, self.k, self.sparsity_warmup, progress))

    def select(self, pre_acts: Float[Tensor, "batch d_sae"], k: int) -> SparseLatents:
        """Return the active latents of a training batch, k a row."""
        return largest(pre_acts, k)

    def forward(
        self,
        x: Float[Tensor, "batch d_model"],
        total_variance: Float[Tensor, ""],
        dead: Bool[Tensor, "d_sae"],
        progress: float = 1.0,
        share: float | Float[Tensor, ""] = 1.0,
        all_sum: AllSum = same,
    ) -> SAEOutput:
        """Return reconstruction, latents and loss terms of a training batch.

        Losses: fvu, and auxk = alpha * share * sum |e - e_hat|^2 / total_variance, with
        e = x - x_hat detached, e_hat its reconstruction from the top dead latents and
        share = min(dead / max_auxk, 1), so that a handful of dead latents does not get the full
        weight.
        """
        pre_acts = self.pre_acts(x)
        latents = self.select(pre_acts, self.k_at(progress))
        reconstruction, losses = self.reconstruct(x, latents, total_variance)
        num_dead = int(dead.sum()) if self.auxk_alpha > 0 else 0
        if num_dead > 0:
            masked = pre_acts.masked_fill(~dead, -torch.inf)
            predicted = self.combine(largest(masked, min(num_dead, self.max_auxk)))
            squares = ((x - reconstruction).detach() - predicted).square().sum()
            weight = self.auxk_alpha * min(num_dead / self.max_auxk, 1.0)
            losses["auxk"] = weight * squares / total_variance
        return SAEOutput(reconstruction, latents, losses)

    def reconstruct(
        self,
        x: Float[Tensor, "batch d_model"],
        latents: SparseLatents,
        total_variance: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, "batch d_model"], dict[str, Float[Tensor, ""]]]:
        """Return the reconstruction and the loss terms that come from it."""
        reconstruction = self.decode(latents)
        return reconstruction, {"fvu": (x - reconstruction).square().sum() / total_variance}

    def training_flops(self) -> int:
        """Return the FLOPs per token of a training step, 4 d n + 6 d k.

        Encoder forward and weight gradient are dense, 2 d n each; decoding and its two gradients
        touch k rows, 2 d k each. AuxK, which runs only while latents are dead, is not counted,
        nor what k_start adds at the beginning.
        """
        return self.d_model * (4 * self.d_sae + 6 * self.k)

    def inference_flops(self) -> int:
        """Return the FLOPs per token of encoding and decoding, 2 d n + 2 d k."""
        return 2 * self.d_model * (self.d_sae + self.k)


def largest(pre_acts: Float[Tensor, "batch d_sae"], k: int) -> SparseLatents:
    """Return the k largest latents of each row, after ReLU."""
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    return SparseLatents(values.relu(), indices)
