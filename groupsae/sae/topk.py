"""TopK sparse autoencoder with AuxK (Gao et al., arXiv 2406.04093; paper appendix A and B)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from groupsae.errors import UserError
from groupsae.sae.base import SAE, SAEOutput, SparseLatents


class TopK(SAE):
    """f(x) = TopK(ReLU(W_enc (x - b_dec) + b_enc)), x_hat = W_dec f(x) + b_dec.

    The encoder starts as the transpose of the decoder, whose latents have unit norm; all biases
    start at zero. Weights are [d_sae, d_model] both, one latent a row.

    Departures from the reference code, on purpose: AuxK predicts x - x_hat (not its negative),
    detached, without the decoder bias; a latent fired only if its activation is above zero; the
    decoder is normalised after the step, not before the next one.

    Args:
        d_model: width of the residual stream.
        expansion: latents per dimension; d_sae = round(expansion * d_model).
        k: active latents per row.
        auxk_alpha: weight of the AuxK term (paper: 1/32); 0 switches it off.
        auxk_share: AuxK uses up to auxk_share * d_model dead latents (0.5, as Gao et al. and the
            reference code do; the paper's text says half of d_sae).
        generator: for the initial weights.
    """

    def __init__(
        self,
        *,
        d_model: int,
        expansion: float,
        k: int,
        auxk_alpha: float,
        auxk_share: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        d_sae = round(expansion * d_model)
        if d_sae < 1:
            raise UserError(f"sae.expansion is {expansion}; it must be above 0, such as 16.")
        if not 1 <= k <= d_sae:
            raise UserError(f"sae.k is {k}; it must lie between 1 and the {d_sae} latents.")
        self.d_model, self.d_sae, self.k = d_model, d_sae, k
        self.auxk_alpha, self.max_auxk = auxk_alpha, max(1, round(auxk_share * d_model))
        # the generator's device, not the default one: Lightning builds modules on the accelerator
        directions = torch.randn(d_sae, d_model, generator=generator, device=generator.device).to(
            torch.get_default_device()
        )
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def pre_acts(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Return W_enc (x - b_dec) + b_enc.

        b_dec goes through the bias, which saves the backward pass a full-size product.
        """
        return F.linear(x, self.W_enc, self.b_enc - self.W_enc @ self.b_dec)

    def select(self, pre_acts: Float[Tensor, "batch d_sae"], k: int) -> SparseLatents:
        """Return the k largest latents of each row, after ReLU."""
        values, indices = pre_acts.topk(k, dim=-1, sorted=False)
        return SparseLatents(values.relu(), indices)

    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the active latents of scaled activations."""
        return self.select(self.pre_acts(x), self.k)

    def decode(self, latents: SparseLatents) -> Float[Tensor, "batch d_model"]:
        """Return the reconstruction; touches only the k rows of the decoder that are active."""
        return self._combine(latents) + self.b_dec

    def decode_dense(
        self, latents: Float[Tensor, "*batch d_sae"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the reconstruction from dense latents, any number of them active."""
        return latents @ self.W_dec + self.b_dec

    def directions(self) -> Float[Tensor, "d_sae d_model"]:
        """Return the decoder; its rows have unit norm."""
        return self.W_dec.detach()

    def _combine(self, latents: SparseLatents) -> Tensor:
        return F.embedding_bag(
            latents.indices, self.W_dec, mode="sum", per_sample_weights=latents.acts
        )

    def forward(
        self,
        x: Float[Tensor, "batch d_model"],
        total_variance: Float[Tensor, ""],
        dead: Bool[Tensor, "d_sae"],
    ) -> SAEOutput:
        """Return reconstruction, latents and loss terms of a training batch.

        Losses: fvu = sum |x - x_hat|^2 / total_variance and
        auxk = alpha * share * sum |e - e_hat|^2 / total_variance, with e = x - x_hat detached,
        e_hat its reconstruction from the top dead latents and share = min(dead / max_auxk, 1),
        so that a handful of dead latents does not get the full weight.

        Args:
            x: scaled activations.
            total_variance: sum over the *global* batch of |x - mean|^2; with several processes
                it is more than this batch's own.
            dead: latents that have not fired for long.
        """
        pre_acts = self.pre_acts(x)
        latents = self.select(pre_acts, self.k)
        reconstruction = self.decode(latents)
        error = x - reconstruction
        losses = {"fvu": error.square().sum() / total_variance}
        num_dead = int(dead.sum()) if self.auxk_alpha > 0 else 0
        if num_dead > 0:
            masked = pre_acts.masked_fill(~dead, -torch.inf)
            predicted = self._combine(self.select(masked, min(num_dead, self.max_auxk)))
            share = min(num_dead / self.max_auxk, 1.0)
            squares = (error.detach() - predicted).square().sum()
            losses["auxk"] = self.auxk_alpha * share * squares / total_variance
        return SAEOutput(reconstruction, latents, losses)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the decoder's gradient what would only change the latents' norms."""
        gradient = self.W_dec.grad
        if gradient is not None:
            gradient -= (gradient * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Make every latent's direction a unit vector again."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
