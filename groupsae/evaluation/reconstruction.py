"""How well activations are rebuilt, from sums per sequence that can be bootstrapped.

A sequence is a block of the held-out text. Whatever stands at the head of a table is kept per
sequence (to resample sequences); the rest is kept over all of them. Sums over the dimensions of
a token are taken in the precision of the activations, everything above that in float64 on the
CPU.

Notation: x activation, y = x_hat its reconstruction, e = x - y, n tokens.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from groupsae.sae.base import SparseLatents

# 1 - |e|^2 / |x - batch mean|^2, x . y / (|x| |y|), |y| / |x|, |y|^2 and x . y
OTHERS = ("legacy", "cosine", "norm_ratio", "squares", "product")
DENSE = 0.1  # a latent that fires on a larger share of tokens is dense


class PerSequence:
    """One row of numbers a sequence, float64, appended block by block.

    Args:
        shape: of a row.
    """

    def __init__(self, *shape: int) -> None:
        self._parts: list[npt.NDArray[np.float64]] = [np.zeros((0, *shape))]

    def append(self, rows: Shaped[Tensor, "block *row"]) -> None:
        """Add the rows of some sequences."""
        self._parts.append(rows.cpu().double().numpy())

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """Return the rows of all sequences so far, [sequences, *shape]."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]


class LayerSums:
    """What a layer's activations alone say: the denominator of its FVU, for any resample.

    Sums are of z = x - shift, with the mean of the first batch as the shift: a variance does not
    depend on it, and large constant dimensions then do not swallow the digits of the others.
    For weights w of the sequences, the variance is
    w @ sum_squares - |w @ sum_x|^2 / (w @ count).

    Args:
        d_model: width of the activations.
    """

    def __init__(self, d_model: int) -> None:
        self.d_model = d_model
        self._shift: Tensor | None = None
        self._count, self._sum_squares = PerSequence(), PerSequence()
        self._sum_x = PerSequence(d_model)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "block pos d_model"],
        keep: Bool[Tensor, "block pos"] | None,
    ) -> None:
        """Add blocks of activations; positions where keep is False are left out."""
        x = x.float()
        kept = (x if keep is None else x[keep]).reshape(-1, self.d_model)
        if self._shift is None and len(kept) > 0:
            self._shift = kept.mean(0)
        z = x if self._shift is None else x - self._shift
        if keep is not None:
            z = torch.where(keep.unsqueeze(-1), z, 0.0)
        self._count.append(_counts(x, keep))
        self._sum_x.append(z.sum(1, dtype=torch.float64))
        self._sum_squares.append(_per_sequence(z.square().sum(-1), keep))

    @property
    def count(self) -> Float64[np.ndarray, " sequence"]:
        """Return the tokens of each sequence."""
        return self._count.values

    @property
    def sum_x(self) -> Float64[np.ndarray, "sequence d_model"]:
        """Return the sum of x - shift of each sequence."""
        return self._sum_x.values

    @property
    def sum_squares(self) -> Float64[np.ndarray, " sequence"]:
        """Return the sum of |x - shift|^2 of each sequence."""
        return self._sum_squares.values

    @property
    def variance(self) -> float:
        """Return the sum over all tokens of |x - mean|^2, the mean being that of all tokens."""
        total = self.sum_x.sum(0)
        return float(self.sum_squares.sum() - total @ total / max(self.count.sum(), 1.0))

    @property
    def squares(self) -> float:
        """Return the sum over all tokens of |x|^2."""
        if self._shift is None:
            return 0.0
        shift = self._shift.double().cpu().numpy()
        return float(
            self.sum_squares.sum()
            + 2 * shift @ self.sum_x.sum(0)
            + self.count.sum() * (shift @ shift)
        )


class ReconstructionSums:
    """What the reconstructions of one layer by one SAE add up to.

    Attributes:
        fired: tokens on which each latent was above zero.

    Args:
        d_model: width of the activations.
        d_sae: number of latents.
    """

    fired: Int64[np.ndarray, " d_sae"]

    def __init__(self, d_model: int, d_sae: int) -> None:
        self.d_model, self.d_sae = d_model, d_sae
        self._count, self._squared_error, self._active = (PerSequence() for _ in range(3))
        self._error = np.zeros(d_model)
        self._others = {name: PerSequence() for name in OTHERS}
        self.fired = np.zeros(d_sae, dtype=np.int64)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "block pos d_model"],
        x_hat: Float[Tensor, "block pos d_model"],
        latents: SparseLatents,
        keep: Bool[Tensor, "block pos"] | None,
    ) -> None:
        """Add blocks of activations.

        Args:
            x: activations.
            x_hat: their reconstructions, in the units of x.
            latents: of the same tokens, [block * pos, k].
            keep: positions that count; None for all.
        """
        x, x_hat = x.float(), x_hat.float()
        error = x - x_hat
        squared_error = error.square().sum(-1)
        self._count.append(_counts(x, keep))
        self._squared_error.append(_per_sequence(squared_error, keep))
        if keep is not None:
            error = torch.where(keep.unsqueeze(-1), error, 0.0)
        self._error += error.sum((0, 1), dtype=torch.float64).cpu().numpy()

        mean = (x if keep is None else x[keep]).reshape(-1, self.d_model).mean(0)
        squares, product = x_hat.square().sum(-1), (x * x_hat).sum(-1)
        norm, norm_hat = x.norm(dim=-1), squares.sqrt()
        per_token = {
            "legacy": _explained(squared_error, (x - mean).square().sum(-1)),
            "cosine": _zero_unless(norm * norm_hat, product),
            "norm_ratio": _zero_unless(norm, norm_hat),
            "squares": squares,
            "product": product,
        }
        for name, values in per_token.items():
            self._others[name].append(_per_sequence(values, keep))

        active = latents.acts > 0
        if keep is not None:
            active = active & keep.reshape(-1, 1)
        self._active.append(active.sum(-1).reshape(x.shape[:2]).sum(-1))
        fired = torch.bincount(latents.indices[active], minlength=self.d_sae)
        self.fired = self.fired + fired.cpu().numpy()

    @property
    def count(self) -> Float64[np.ndarray, " sequence"]:
        """Return the tokens of each sequence."""
        return self._count.values

    @property
    def squared_error(self) -> Float64[np.ndarray, " sequence"]:
        """Return the sum of |x - x_hat|^2 of each sequence."""
        return self._squared_error.values

    @property
    def active(self) -> Float64[np.ndarray, " sequence"]:
        """Return the number of activations above zero of each sequence."""
        return self._active.values

    @property
    def ratios(self) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Return the metrics that are a sum over tokens by another: both, of each sequence."""
        sums = {name: sums.values for name, sums in self._others.items()}
        return {
            "explained_variance_legacy": (sums["legacy"], self.count),
            "mse": (self.squared_error, self.count),
            "cosine": (sums["cosine"], self.count),
            "norm_ratio": (sums["norm_ratio"], self.count),
            "relative_bias": (sums["squares"], sums["product"]),
            "l0": (self.active, self.count),
        }

    @property
    def error_variance(self) -> float:
        """Return the sum over all tokens of |e - mean e|^2."""
        tokens = max(self.count.sum(), 1.0)
        return float(self.squared_error.sum() - self._error @ self._error / tokens)


def layer_metrics(layer: LayerSums, sums: ReconstructionSums) -> dict[str, float | None]:
    """Return the quality of one SAE on one layer; None where a ratio is not defined.

    - fvu = sum |e|^2 / sum |x - mean|^2, the mean over all tokens: the primary metric (the loss
      of the paper, appendix B, but over the whole set). SAELens 6 calls 1 - fvu
      explained_variance.
    - explained_variance_legacy = mean over tokens of 1 - |e|^2 / |x - batch mean|^2, the batch
      being what was handed to `update`: the only metric here that depends on the batches. What
      the paper prints; `explained_variance_legacy` of SAELens and SAEBench.
    - explained_variance_dictionary_learning = 1 - sum_d var(e_d) / sum_d var(x_d): a constant
      error costs nothing. `frac_variance_explained` of dictionary_learning, which averages it
      over batches; here over all tokens at once.
    - explained_variance_saebench = 1 - mean |e|^2 / (mean |x|^2 - (mean of all entries x_d^2)^2):
      what SAEBench 0.6.0 prints as explained_variance. Its denominator is not a variance: the
      units do not agree, and it may be negative. For comparison only.
    - mse = mean over tokens of |e|^2 (summed over dimensions, as SAELens).
    - cosine = mean over tokens of x . y / (|x| |y|), norm_ratio = mean over tokens of |y| / |x|;
      0 for a token of norm zero.
    - relative_bias = mean |y|^2 / mean x . y; below 1 if reconstructions are too short
      (Rajamanoharan et al., arXiv 2404.16014, equation 10).
    - l0 = mean over tokens of the number of latents above zero.
    - dead = share of latents that never were above zero here, dense = share of latents above
      zero on more than a tenth of the tokens.

    Args:
        layer: sums of the layer.
        sums: sums of the SAE on that layer, over the same tokens.

    Raises:
        ValueError: the two did not see the same number of tokens in each sequence.
    """
    if not np.array_equal(layer.count, sums.count):
        raise ValueError("the layer and the reconstructions did not see the same tokens")
    tokens = float(sums.count.sum())
    squared_error, mean_square = float(sums.squared_error.sum()), _ratio(layer.squares, tokens)
    entries = mean_square / sums.d_model
    ratios = {name: _ratio(top.sum(), bottom.sum()) for name, (top, bottom) in sums.ratios.items()}
    values = {
        "fvu": _ratio(squared_error, layer.variance),
        "explained_variance_legacy": ratios["explained_variance_legacy"],
        "explained_variance_dictionary_learning": 1 - _ratio(sums.error_variance, layer.variance),
        "explained_variance_saebench": 1
        - _ratio(_ratio(squared_error, tokens), mean_square - entries**2),
        **ratios,
        "dead": float((sums.fired == 0).mean()),
        "dense": float((sums.fired > DENSE * tokens).mean()),
    }
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _counts(x: Tensor, keep: Tensor | None) -> Tensor:
    return torch.full(x.shape[:1], x.shape[1]) if keep is None else keep.sum(1)


def _per_sequence(values: Tensor, keep: Tensor | None) -> Tensor:
    """Return the float64 sums over the positions that count; the others may hold anything."""
    if keep is not None:
        values = torch.where(keep, values, 0.0)
    return values.cpu().double().sum(1)


def _explained(squared_error: Tensor, variance: Tensor) -> Tensor:
    """Return 1 - error / variance; 0 for a token that is the batch mean itself."""
    return torch.where(variance > 0, 1 - squared_error / variance, 0.0)


def _zero_unless(denominator: Tensor, numerator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else math.nan
