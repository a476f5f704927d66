"""How well activations are rebuilt, from sums per sequence that can be bootstrapped.

**To add a metric**: a ratio of two sums over tokens (most are) needs an entry of `per_token` in
`ReconstructionSums.update`, a line in `RATIOS`, and its formula in the list of `layer_metrics`.
It then has a confidence interval in evaluation.json and results.csv, and is logged. Any other
needs its own sum and a line in `layer_metrics`. Metrics of the loss are in effect.py.

A sequence is a block of the held-out text. Sums over the dimensions of a token are taken in the
precision of the activations, all others in float64 on the CPU.

Notation: x activation, y = x_hat its reconstruction, e = x - y.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from groupsae.sae.base import SparseLatents

# metric -> sums above and below the fraction line
RATIOS = {
    "explained_variance_legacy": ("legacy", "count"),
    "mse": ("squared_error", "count"),
    "cosine": ("cosine", "count"),
    "norm_ratio": ("norm_ratio", "count"),
    "relative_bias": ("squares", "product"),
    "l0": ("active", "count"),
}
LARGEST = (
    0.01  # share of the dimensions, those with the largest variance, that fvu_rest leaves out
)
DENSE = 0.1  # a latent that fires on a larger share of tokens is dense


class SequenceSums:
    """Sums by name, each with one row of numbers per sequence: float64, [sequence, ...]."""

    def __init__(self) -> None:
        self._parts: dict[str, list[npt.NDArray[np.float64]]] = {}

    def append(self, **rows: Shaped[Tensor, "block ..."]) -> None:
        """Add the sums of some sequences, always under the same names."""
        for name, row in rows.items():
            self._parts.setdefault(name, []).append(row.cpu().double().numpy())

    def __getitem__(self, name: str) -> npt.NDArray[np.float64]:
        """Return the sums of all sequences so far."""
        parts = self._parts.get(name, [np.zeros(0)])
        if len(parts) > 1:
            parts[:] = [np.concatenate(parts)]
        return parts[0]


class LayerSums(SequenceSums):
    """Sums over a layer's activations: the denominator of its FVU, for any resample.

    `count` tokens, `sum_x` and `sum_squares` of z = x - shift, where the shift is the mean of the
    first batch: a variance does not depend on it, and large constant dimensions then do not
    swallow the digits of the others. For weights w of the sequences, the variance is
    w @ sum_squares - |w @ sum_x|^2 / (w @ count).
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self._shift: Tensor | None = None
        self._squares = np.zeros(d_model)

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
        self.append(
            count=_counts(x, keep),
            sum_x=z.sum(1, dtype=torch.float64),
            sum_squares=_per_sequence(z.square().sum(-1), keep),
        )
        self._squares += z.square().sum((0, 1), dtype=torch.float64).cpu().numpy()

    @property
    def variance(self) -> float:
        """Return the sum over all tokens of |x - mean|^2, the mean being that of all tokens."""
        total = self["sum_x"].sum(0)
        return float(self["sum_squares"].sum() - total @ total / max(self["count"].sum(), 1.0))

    @property
    def variances(self) -> Float64[np.ndarray, " d_model"]:
        """Return the parts of `variance`, by dimension."""
        return self._squares - self["sum_x"].sum(0) ** 2 / max(self["count"].sum(), 1.0)

    @property
    def largest(self) -> Int64[np.ndarray, " dimension"]:
        """Return the dimensions with the largest variance, `LARGEST` of them all, at least one."""
        return np.argsort(self.variances)[-math.ceil(LARGEST * self.d_model) :]

    @property
    def largest_share(self) -> float:
        """Return the share of the variance that is in the `largest` dimensions."""
        return _ratio(self.variances[self.largest].sum(), self.variance)

    @property
    def squares(self) -> float:
        """Return the sum over all tokens of |x|^2."""
        if self._shift is None:
            return 0.0
        shift = self._shift.double().cpu().numpy()
        return float(
            self["sum_squares"].sum()
            + 2 * shift @ self["sum_x"].sum(0)
            + self["count"].sum() * (shift @ shift)
        )


class ReconstructionSums(SequenceSums):
    """Sums over one SAE's reconstructions of one layer, in its units: those in `RATIOS`.

    Attributes:
        fired: tokens on which each latent was above zero.
    """

    fired: Int64[np.ndarray, " d_sae"]

    def __init__(self, d_model: int, d_sae: int) -> None:
        super().__init__()
        self.d_model, self.d_sae = d_model, d_sae
        self._error = np.zeros(d_model)
        self._squared_error = np.zeros(d_model)
        self.fired = np.zeros(d_sae, dtype=np.int64)

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "block pos d_model"],
        x_hat: Float[Tensor, "block pos d_model"],
        latents: SparseLatents,
        keep: Bool[Tensor, "block pos"] | None,
    ) -> None:
        """Add blocks of activations; positions where keep is False are left out."""
        x, x_hat = x.float(), x_hat.float()
        error = x - x_hat
        squared_error = error.square().sum(-1)
        mean = (x if keep is None else x[keep]).reshape(-1, self.d_model).mean(0)
        variance = (x - mean).square().sum(-1)
        squares, product = x_hat.square().sum(-1), (x * x_hat).sum(-1)
        norm, norm_hat = x.norm(dim=-1), squares.sqrt()
        active = latents.acts > 0
        per_token = {
            "squared_error": squared_error,
            # 0 for a token that is the batch mean itself
            "legacy": torch.where(variance > 0, 1 - squared_error / variance, 0.0),
            "cosine": _zero_unless(norm * norm_hat, product),
            "norm_ratio": _zero_unless(norm, norm_hat),
            "squares": squares,
            "product": product,
            "active": active.sum(-1).reshape(x.shape[:2]),
        }
        sums = {name: _per_sequence(values, keep) for name, values in per_token.items()}
        self.append(count=_counts(x, keep), **sums)
        if keep is not None:
            error = torch.where(keep.unsqueeze(-1), error, 0.0)
            active = active & keep.reshape(-1, 1)
        self._error += error.sum((0, 1), dtype=torch.float64).cpu().numpy()
        by_dimension = error.square().sum((0, 1), dtype=torch.float64)
        self._squared_error += by_dimension.cpu().numpy()
        fired = torch.bincount(latents.indices[active], minlength=self.d_sae)
        self.fired = self.fired + fired.cpu().numpy()

    @property
    def ratios(self) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Return both sums of each metric in `RATIOS`, of each sequence."""
        return {name: (self[top], self[bottom]) for name, (top, bottom) in RATIOS.items()}

    def without(self, dimensions: Int64[np.ndarray, " dimension"]) -> float:
        """Return the sum over all tokens of |e|^2 in the other dimensions."""
        return float(np.delete(self._squared_error, dimensions).sum())

    @property
    def error_variance(self) -> float:
        """Return the sum over all tokens of |e - mean e|^2."""
        tokens = max(self["count"].sum(), 1.0)
        return float(self["squared_error"].sum() - self._error @ self._error / tokens)


def layer_metrics(layer: LayerSums, sums: ReconstructionSums) -> dict[str, float | None]:
    """Return the quality of one SAE on one layer; None where a ratio is not defined.

    - fvu = sum |e|^2 / sum |x - mean|^2, the mean over all tokens: the primary metric (the loss
      of the paper, appendix B, but over the complete set). SAELens 6 calls 1 - fvu
      explained_variance.
    - fvu_rest = the same without the dimensions of the largest variance (1 % of them, at least
      one): if these hold most of the variance, fvu shows little but them.
    - explained_variance_legacy = mean over tokens of 1 - |e|^2 / |x - batch mean|^2, the batch
      being the argument of `update`: the only metric here that depends on the batches. The
      paper's; `explained_variance_legacy` of SAELens and SAEBench.
    - explained_variance_dictionary_learning = 1 - sum_d var(e_d) / sum_d var(x_d): a constant
      error costs nothing. `frac_variance_explained` of dictionary_learning, which averages it
      over batches; here over all tokens together.
    - explained_variance_saebench = 1 - mean |e|^2 / (mean |x|^2 - (mean of all entries x_d^2)^2):
      `explained_variance` of SAEBench 0.6.0. Its denominator is not a variance: the units do not
      agree, and it may be negative. For comparison only.
    - mse = mean over tokens of |e|^2 (summed over dimensions, as SAELens).
    - cosine = mean over tokens of x . y / (|x| |y|), norm_ratio = mean over tokens of |y| / |x|;
      0 for a token of norm zero.
    - relative_bias = mean |y|^2 / mean x . y; below 1 if reconstructions are too short
      (Rajamanoharan et al., arXiv 2404.16014, equation 10).
    - l0 = mean over tokens of the number of latents above zero.
    - dead = share of latents that were never above zero here, dense = share of latents above
      zero on more than a tenth of the tokens.

    Raises:
        ValueError: the two did not see the same number of tokens in each sequence.
    """
    if not np.array_equal(layer["count"], sums["count"]):
        raise ValueError("the layer and the reconstructions did not see the same tokens")
    tokens, squared_error = float(sums["count"].sum()), float(sums["squared_error"].sum())
    mean_square = _ratio(layer.squares, tokens)
    saebench = mean_square - (mean_square / sums.d_model) ** 2
    ratios = {name: _ratio(top.sum(), bottom.sum()) for name, (top, bottom) in sums.ratios.items()}
    values = {
        "fvu": _ratio(squared_error, layer.variance),
        "fvu_rest": _ratio(
            sums.without(layer.largest), float(np.delete(layer.variances, layer.largest).sum())
        ),
        "explained_variance_legacy": ratios["explained_variance_legacy"],
        "explained_variance_dictionary_learning": 1 - _ratio(sums.error_variance, layer.variance),
        "explained_variance_saebench": 1 - _ratio(_ratio(squared_error, tokens), saebench),
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
        values = torch.where(keep, values, 0)
    return values.cpu().double().sum(1)


def _zero_unless(denominator: Tensor, numerator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else math.nan
