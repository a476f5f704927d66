"""One layer's view of a suite: the SAE of its group, on raw activations of the layer."""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groupsae.interop.dictionary_learning import DICTIONARY_LEARNING
from groupsae.interop.formats import check_holds
from groupsae.interop.library import Library, Origin, fold_norm_factor
from groupsae.interop.saelens import SAELENS
from groupsae.interop.sparsify import SPARSIFY
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE, SparseLatents
from groupsae.sae.gated import Gated

Acts = Float[Tensor, "*batch d_model"] | Float[np.ndarray, "*batch d_model"]
Dense = Float[Tensor, "*batch d_sae"] | Float[np.ndarray, "*batch d_sae"]


class LayerSAE(nn.Module):
    """The SAE of one layer, `suite[5]`: the weights of its group, the norm factor of this layer.

    Activations are raw, as the language model has them; latents are as the SAE has them. With s
    the layer's norm factor and SAE(x) the SAE of the group,

        encode(acts) = encode_SAE(s acts)    decode(z) = (z W_dec + b_dec) / s

    so a latent of value v adds v `direction(latent)` = v W_dec[latent] / s to the raw residual
    stream. `W_enc`, `W_dec`, `b_enc` and `b_dec` are in units of the scaled activations s acts.
    All layers of a group share one SAE, so moving or changing one moves or changes all. Where
    layers have biases or maps of their own, the weights are those of this layer, `SAE.at`, and
    copies where they differ.
    Weights are frozen; gradients reach the activations and the latents.

    Args:
        sae: the SAE of the group, which takes activations times the norm factor.
        layer: the layer.
        group: name of the group in the suite, such as `layers.3-5`.
        cfg: the SAE's `cfg.json`.

    >>> import torch
    >>> from groupsae import TopK
    >>> cfg = {"layers": [3, 4], "norm_factors": {"3": 0.5, "4": 0.25}}
    >>> sae = LayerSAE(TopK(d_model=8, d_sae=32, k=4), 4, "layers.3-4", cfg)
    >>> acts = torch.ones(2, 10, 8)
    >>> z = sae.encode(acts)
    >>> z.shape, sae.decode(z).shape
    (torch.Size([2, 10, 32]), torch.Size([2, 10, 8]))

    What a latent adds to the raw residual stream, in the order of its value:

    >>> z = torch.zeros(32)
    >>> z[7] = 2.0
    >>> added = sae.decode(z) - sae.decode(torch.zeros(32))
    >>> torch.allclose(added, 2.0 * sae.direction(7), atol=1e-6)
    True
    >>> torch.equal(sae.direction(7), sae.W_dec[7] / 0.25)
    True
    """

    def __init__(self, sae: SAE, layer: int, group: str, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        self.sae, self.layer, self.group, self.cfg = sae.at(layer), layer, group, cfg
        by_layer = {str(key): float(factor) for key, factor in cfg["norm_factors"].items()}
        self.norm_factor = by_layer[str(layer)]  # (JSON has text as keys, a dict may have layers)
        self.eval().requires_grad_(False)

    # ---- what it is ---------------------------------------------------------------------

    @property
    def layers(self) -> list[int]:
        """Return all layers that share these weights."""
        return list(self.cfg["layers"])

    @property
    def d_model(self) -> int:
        """Return the width of the activations."""
        return self.sae.d_model

    @property
    def d_sae(self) -> int:
        """Return the number of latents."""
        return self.sae.d_sae

    @property
    def W_enc(self) -> Float[Tensor, "d_model d_sae"]:  # noqa: N802
        """Return the encoder, a column for each latent: a view, for activations s acts."""
        return self.sae.W_enc.T

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_model"]:  # noqa: N802
        """Return the decoder, a row for each latent, in units of s acts.

        Rows have unit norm, but for those of layers with maps of their own.
        """
        return self.sae.W_dec

    @property
    def b_enc(self) -> Float[Tensor, "d_sae"]:
        """Return the encoder's bias; of a gated SAE `b_gate`, which decides what is active.

        A gated SAE's `b_mag` and `r_mag`, a jumprelu's `log_threshold` and a batchtopk's
        `threshold` are attributes of `.sae`.
        """
        return self.sae.b_gate if isinstance(self.sae, Gated) else self.sae.b_enc

    @property
    def b_dec(self) -> Float[Tensor, "d_model"]:
        """Return the decoder's bias, which the encoder subtracts first, in units of s acts."""
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights, in which it computes: float32 as saved."""
        return self.W_dec.dtype

    # ---- raw activations of the layer <-> input and output of the SAE -------------------------

    def scaled(self, acts: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the SAE's input for raw activations of the layer: s acts."""
        return acts * self.norm_factor

    def unscaled(self, x_hat: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the SAE's output at the scale of the layer's raw activations: x_hat / s."""
        return x_hat / self.norm_factor

    # ---- use ----------------------------------------------------------------------------

    def encode(self, acts: Acts) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of raw activations, dense, in the dtype of the SAE.

        Args:
            acts: raw activations of the layer, of any leading shape and float dtype, on the SAE's
                device; or an array.

        Raises:
            UserError: they have another width, or are on another device.
        """
        return self.encode_sparse(acts).dense(self.d_sae)

    def encode_sparse(self, acts: Acts) -> SparseLatents:
        """Return the active latents of raw activations: `acts` and `indices`, [*batch, k].

        Where rows have different numbers of active latents, k is the largest, and the surplus
        entries of the others have the value zero. Arguments and errors are those of `encode`.
        """
        rows = self._ours(acts, self.d_model, "activations")
        values, indices, _ = self.sae.encode(self.scaled(rows.reshape(-1, self.d_model)))
        shape = (*rows.shape[:-1], values.shape[-1])
        return SparseLatents(values.reshape(shape), indices.reshape(shape))

    def decode(self, latents: Dense | SparseLatents) -> Float[Tensor, "*batch d_model"]:
        """Return the reconstruction at the scale of the layer's raw activations.

        Args:
            latents: dense, [*batch, d_sae], or those of `encode_sparse`. The results differ by
                rounding, for the latents are added in another order.

        Raises:
            UserError: dense latents have another width, or they are on another device.
        """
        if not isinstance(latents, SparseLatents):
            return self.unscaled(self.sae.decode_dense(self._ours(latents, self.d_sae, "latents")))
        shape = latents.acts.shape
        values = self._ours(latents.acts, shape[-1], "latents").reshape(-1, shape[-1])
        indices = latents.indices.reshape(values.shape)
        x_hat = self.unscaled(self.sae.decode(SparseLatents(values, indices)))
        return x_hat.reshape(*shape[:-1], self.d_model)

    def forward(self, acts: Acts) -> Float[Tensor, "*batch d_model"]:
        """Return the reconstruction of raw activations, `decode(encode_sparse(acts))`."""
        return self.decode(self.encode_sparse(acts))

    def direction(
        self, latents: SupportsIndex | Sequence[int] | np.ndarray | Int[Tensor, "*latent"]
    ) -> Float[Tensor, "*latent d_model"]:
        """Return what a value of 1 of a latent adds to the raw residual stream: W_dec[latent] / s.

        Raises:
            UserError: the SAE has no such latent.
        """
        found = latents if isinstance(latents, Tensor) else np.asarray(latents)
        index = torch.as_tensor(found, device=self.device)
        outside = index[(index < 0) | (index >= self.d_sae)]
        if len(outside.flatten()):
            raise UserError(
                f"latent {int(outside.flatten()[0])} is out of range: {self.group} has "
                f"{self.d_sae} latents, 0 to {self.d_sae - 1}."
            )
        return self.unscaled(self.W_dec[index])

    # ---- objects of other libraries -----------------------------------------------------------

    def to_saelens(self) -> Any:
        """Return this SAE as SAELens' own object, a `sae_lens.SAE`, on the same device.

        The norm factor s is folded into its biases: it takes raw activations, its latents are
        those of `encode` divided by s, and its reconstructions are equal.

        Raises:
            UserError: sae-lens is not installed.
        """
        return self._as(SAELENS, "to_saelens()")

    def to_sparsify(self) -> Any:
        """Return this SAE as sparsify's own object, a `SparseCoder`, as `to_saelens` does.

        Raises:
            UserError: it is no topk SAE, or eai-sparsify is not installed.
        """
        return self._as(SPARSIFY, "to_sparsify()")

    def to_dictionary_learning(self) -> Any:
        """Return this SAE as dictionary_learning's own object, as `to_saelens` does.

        Raises:
            UserError: dictionary-learning is not installed.
        """
        return self._as(DICTIONARY_LEARNING, "to_dictionary_learning()")

    def _as(self, library: Library, asked: str) -> Any:
        check_holds(library, self.sae, self.group)
        folded = fold_norm_factor(self.sae, self.norm_factor)
        origin = Origin.of(self.group, self.layer, dict(self.cfg))
        return library.own_object(folded, origin, asked).to(self.device)

    def _ours(self, values: Tensor | np.ndarray, width: int, what: str) -> Tensor:
        """Return values as a tensor in the SAE's dtype, after a check of width and device."""
        if not isinstance(values, Tensor):
            values = torch.tensor(values, device=self.device)
        if values.ndim == 0 or values.shape[-1] != width:
            raise UserError(
                f"{what} of layer {self.layer} have the shape {list(values.shape)}, and its SAE "
                f"takes [..., {width}]: give activations of the model it was trained on, or the "
                "latents of this layer."
            )
        if values.device != self.device:
            raise UserError(
                f"{what} of layer {self.layer} are on {values.device} and its SAE is on "
                f"{self.device}: move one of them, such as suite.to('{values.device}')."
            )
        return values.to(self.dtype)

    def __repr__(self) -> str:
        """Return the layer, the SAE and the norm factor in one line."""
        return (
            f"LayerSAE(layer={self.layer}, group={self.group!r}, sae={self.sae}, "
            f"norm_factor={self.norm_factor:.4g})"
        )
