"""TopK sparse autoencoder with AuxK (Gao et al., arXiv 2406.04093; paper appendix A and B)."""

from collections.abc import Sequence
from typing import ClassVar, Required, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE, GlobalBatch, SAEOutput, Size, SparseLatents, ramp
from groupsae.sae.checks import check_count, check_positive, check_share, is_number
from groupsae.sae.kernels.dispatch import DENSE_SHARE, affine, top_k
from groupsae.sae.sparse import Decode, Encode, Entries

SELECTIONS = ("float32", "bfloat16")
CANDIDATES = 2  # for each active latent, where those are found in bfloat16


class TopKArguments(Size, total=False):
    """The arguments of `TopK`, for kinds that pass them on."""

    k: Required[int]
    k_start: int | None
    sparsity_warmup: float
    auxk_alpha: float
    auxk_share: float
    selection: str


class TopK(SAE):
    """f(x) = TopK(ReLU(W_enc (x - b_dec) + b_enc)).

    Departures from the reference code, on purpose: AuxK predicts x - x_hat (not its negative),
    detached, without the decoder bias; a latent fired only if its activation is above zero; the
    decoder is normalised after the step, not before the next one.

    Args:
        k: active latents per row.
        k_start: active latents at the start of training; None: k.
        sparsity_warmup: share of the training in which k_start goes over to k, linearly.
        auxk_alpha: weight of the AuxK term (paper: 1/32); 0 switches it off.
        auxk_share: AuxK uses up to auxk_share * d_model dead latents (0.5, as Gao et al. and the
            reference code; the paper's text has half of d_sae).
        selection: dtype of the encoder's product that finds a training step's active latents,
            float32 or bfloat16; their values and all gradients are float32 either way.
        **size: of `SAE`.

    Raises:
        UserError: k or k_start is not between 1 and the number of latents.

    >>> sae = TopK(d_model=64, d_sae=1024, k=8)
    >>> latents = sae.encode(torch.randn(10, 64))
    >>> latents.indices.shape, sae.decode(latents).shape
    (torch.Size([10, 8]), torch.Size([10, 64]))
    """

    terms: ClassVar[tuple[str, ...]] = ("fvu", "auxk")
    kept_wide = 0.0  # the k active latents of a row are few against the weights

    def __init__(
        self,
        *,
        k: int,
        k_start: int | None = None,
        sparsity_warmup: float = 0.0,
        auxk_alpha: float = 1 / 32,
        auxk_share: float = 0.5,
        selection: str = "float32",
        **size: Unpack[Size],
    ) -> None:
        super().__init__(**size)
        check_share("sparsity_warmup", sparsity_warmup)
        check_count("k", k, self.d_sae)
        check_count("k_start", k if k_start is None else k_start, self.d_sae)
        check_positive(auxk_share=auxk_share)
        if not is_number(auxk_alpha) or auxk_alpha < 0:
            raise UserError(f"sae.auxk_alpha is {auxk_alpha!r}; it must be 0 or more.")
        if selection not in SELECTIONS:
            raise UserError(f"sae.selection is {selection!r}: use {' or '.join(SELECTIONS)}.")
        self.selection = selection
        self.k, self.k_start, self.sparsity_warmup = k, k_start or k, sparsity_warmup
        self.auxk_alpha, self.max_auxk = auxk_alpha, max(1, round(auxk_share * self.d_model))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    def extra_repr(self) -> str:
        """Return the sizes and k."""
        return f"{super().extra_repr()}, k={self.k}"

    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the k largest latents of each row."""
        values, indices = top_k(self.pre_acts(x), self.k)
        return SparseLatents(values.relu(), indices)

    def k_at(self, progress: float) -> int:
        """Return the number of active latents after a share of the training."""
        return round(ramp(self.k_start, self.k, self.sparsity_warmup, progress))

    def select(self, pre_acts: Float[Tensor, "batch d_sae"], k: int) -> SparseLatents:
        """Return the largest pre-activations of a training batch, k a row."""
        return SparseLatents(*top_k(pre_acts, k))

    def narrow(self, candidates: SparseLatents, k: int) -> SparseLatents:
        """Return the largest of the pre-activations that `select` returned, k a row."""
        values, place = top_k(candidates.acts, k)
        return SparseLatents(values, candidates.indices.gather(1, place))

    @torch.no_grad()
    def find(
        self, x: Float[Tensor, "batch d_model"], k: int, sizes: Sequence[int] = ()
    ) -> tuple[SparseLatents, Float[Tensor, "batch d_sae"]]:
        """Return the pre-activations of the active latents, and all, in the dtype of `selection`.

        In bfloat16 the best 2 k are found, computed again in float32, and the best k of those
        taken: its rounding, 2^-9 of a value, reaches across the k-th place but hardly ever
        across as many values again. Of layers with `maps`, x has passed them, and has `sizes`.
        """
        centred = x - self.b_dec
        if self.selection == "float32":
            pre_acts = self._shift(affine(centred, self.W_enc, self.b_enc), sizes)
            return self.select(pre_acts, k), pre_acts
        low = torch.bfloat16
        pre_acts = affine(centred.to(low), self.W_enc.to(low), self.b_enc.to(low))
        pre_acts = self._shift(pre_acts, sizes)
        candidates = self.select(pre_acts, min(CANDIDATES * k, self.d_sae))
        exact = self._encode_at(None, x, candidates.entries(self.d_sae), sizes)
        return self.narrow(candidates._replace(acts=exact.view_as(candidates.acts)), k), pre_acts

    def forward(self, x: Float[Tensor, "batch d_model"], batch: GlobalBatch) -> SAEOutput:
        """Return reconstruction, latents and losses.

        Losses: fvu, and auxk = alpha * share * sum |e - e_hat|^2 / total_variance, with
        e = x - x_hat detached, e_hat its reconstruction from the top dead latents and
        share = min(dead / max_auxk, 1), so that a handful of dead latents does not get the full
        weight.
        """
        h = x if self.maps is None else self.maps.enter(x, batch.sizes, self.b_dec)
        found, pre_acts = self.find(h, self.k_at(batch.progress), batch.sizes)
        entries = found.entries(self.d_sae)
        acts = self._encode_at(found.acts.flatten(), h, entries, batch.sizes).relu()
        reconstruction, losses = self.reconstruct(x, acts, entries, batch)
        num_dead = len(batch.dead)
        if self.auxk_alpha > 0 and num_dead > 0:
            error = (x - reconstruction).detach()
            squares = F.mse_loss(self._auxk(h, pre_acts, batch), error, reduction="sum")
            weight = self.auxk_alpha * min(num_dead / self.max_auxk, 1.0)
            losses["auxk"] = weight * squares / batch.total_variance
        latents = found._replace(acts=acts.detach().view_as(found.acts))
        return SAEOutput(reconstruction, latents, losses)

    def reconstruct(
        self,
        x: Float[Tensor, "batch d_model"],
        acts: Float[Tensor, "entry"],
        entries: Entries,
        batch: GlobalBatch,
    ) -> tuple[Float[Tensor, "batch d_model"], dict[str, Float[Tensor, ""]]]:
        """Return the reconstruction and the losses that come from it."""
        reconstruction = self.x_hat_of(Decode.apply(acts, self.W_dec, entries), batch)
        squares = F.mse_loss(reconstruction, x, reduction="sum")
        return reconstruction, {"fvu": squares / batch.total_variance}

    def _shift(self, pre_acts: Tensor, sizes: Sequence[int]) -> Tensor:
        return pre_acts if self.maps is None else self.maps.shift(pre_acts, sizes, self.W_enc)

    def _encode_at(
        self,
        known: Float[Tensor, "entry"] | None,
        x: Float[Tensor, "batch d_model"],
        entries: Entries,
        sizes: Sequence[int],
        latents: Int[Tensor, "latent"] | None = None,
    ) -> Float[Tensor, "entry"]:
        """Return the pre-activations of entries, which are `known` or not.

        The entries are of all latents, or of some.
        """
        W_enc = self.W_enc if latents is None else self.W_enc[latents]
        b_enc = self.b_enc if latents is None else self.b_enc[latents]
        z = Encode.apply(known, x, W_enc, b_enc, self.b_dec, entries)
        if self.maps is None:
            return z
        has = known is not None
        return self.maps.shift_entries(z, entries, sizes, W_enc, latents=latents, known=has)

    def _auxk(
        self,
        x: Float[Tensor, "batch d_model"],
        pre_acts: Float[Tensor, "batch d_sae"],
        batch: GlobalBatch,
    ) -> Float[Tensor, "batch d_model"]:
        """Return the sum of the top dead latents: a TopK of the dead latents alone."""
        dead = batch.dead
        values, indices = top_k(pre_acts[:, dead], min(len(dead), self.max_auxk))
        known = values.flatten() if self.selection == "float32" else None
        entries = Entries.of_rows(indices, len(dead))
        z = self._encode_at(known, x, entries, batch.sizes, dead)
        e_hat = Decode.apply(z.relu(), self.W_dec[dead], entries)
        return e_hat if self.maps is None else self.maps.leave(e_hat, batch.sizes, bias=False)

    def training_flops(self) -> int:
        """Return the FLOPs per token of a training step, 2 d n + 8 d k.

        The encoder's product is dense, 2 d n; its gradient, decoding and decoding's two gradients
        touch k rows, 2 d k each, or all n where so many are active that dense products are
        faster. And what `maps_flops` adds. Not counted: AuxK, which runs only while latents are
        dead, and what k_start adds.
        """
        touched = self.d_sae if self.k > DENSE_SHARE * self.d_sae else self.k
        again = 2 * CANDIDATES * self.k if self.selection != "float32" else 0
        plain = self.d_model * (2 * self.d_sae + 8 * touched + again)
        return plain + self.maps_flops(touched)

    def inference_flops(self) -> int:
        """Return the FLOPs per token of encoding and decoding, 2 d n + 2 d k."""
        return 2 * self.d_model * (self.d_sae + self.k)
