"""Confidence intervals by resampling documents."""

from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float64, Int64

from groupsae.evaluation.reconstruction import LayerSums, ReconstructionSums

Interval = dict[str, float | None]  # value, low, high; None where undefined


def percentile_interval(
    value: float | None, samples: Float64[np.ndarray, " resample"], level: float
) -> Interval:
    """Return a value with quantiles of its resamples, None if one of them has no value."""
    if value is None or not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if not np.isfinite(samples).all():
        return {"value": float(value), "low": None, "high": None}
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return {"value": float(value), "low": float(low), "high": float(high)}


class Bootstrap:
    """Resamples of the held-out text, the same for every metric: so differences are paired.

    Documents are drawn, with replacement (a cluster bootstrap: Davison and Hinkley 1997, section
    3.8), as the sequences of one document depend on each other: on Python source their losses
    correlate by 0.7 from one to the next, and intervals that took them for independent were a
    half to a third as wide as they should be. A resample is a row of weights, how often each
    sequence was drawn; a pooled ratio on it is the ratio of two weighted sums.

    Attributes:
        weights: float64 [resample, sequence].
        documents: D, number of documents.
        owner: the document of each sequence, from 0 to D - 1.
    """

    weights: Float64[np.ndarray, "resample sequence"]

    def __init__(
        self, documents: Int64[np.ndarray, " sequence"], resamples: int, level: float, seed: int
    ) -> None:
        found, self.owner = np.unique(documents, return_inverse=True)
        self.sequences, self.documents, self.level = len(documents), len(found), level
        chances = np.full(self.documents, 1 / self.documents)
        draws = np.random.default_rng(seed).multinomial(self.documents, chances, size=resamples)
        self.weights = draws.astype(np.float64)[:, self.owner]
        # the slow part of an FVU, which the SAEs of a layer share
        self._variances: WeakKeyDictionary[LayerSums, np.ndarray] = WeakKeyDictionary()

    def interval(self, value: float | None, samples: Float64[np.ndarray, " resample"]) -> Interval:
        """Return the percentile interval: low and high are quantiles of the samples.

        They are None for a single document, which shows nothing about spread, and if a resample
        has no value (a ratio with a denominator of zero). `value` is the metric on all sequences.
        """
        spread = samples if self.documents > 1 else np.full(1, np.nan)
        return percentile_interval(value, spread, self.level)

    def fvu(self, layer: LayerSums, sums: ReconstructionSums) -> Float64[np.ndarray, " resample"]:
        """Return the FVU on each resample, around the resample's own mean: exact, no shortcut.

        The sums of the layer must be complete: do not update them afterwards.

        Raises:
            ValueError: not as many sequences as the bootstrap was made for.
        """
        error = self._resampled(sums["squared_error"])
        if layer not in self._variances:
            total = np.square(self._resampled(layer["sum_x"])).sum(1)
            squares, count = (self._resampled(layer[n]) for n in ("sum_squares", "count"))
            self._variances[layer] = squares - total / np.maximum(count, 1)
        return _divide(error, self._variances[layer])

    def ratio(
        self,
        numerator: Float64[np.ndarray, " sequence"],
        denominator: Float64[np.ndarray, " sequence"],
    ) -> Float64[np.ndarray, " resample"]:
        """Return sum(numerator) / sum(denominator) on each resample; nan where it is 0 / 0.

        Raises:
            ValueError: not as many sequences as the bootstrap was made for.
        """
        return _divide(self._resampled(numerator), self._resampled(denominator))

    def _resampled(self, sums: np.ndarray) -> np.ndarray:
        if len(sums) != self.sequences:
            raise ValueError(f"sums of {len(sums)} sequences, bootstrap of {self.sequences}")
        return self.weights @ sums


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator / denominator)
