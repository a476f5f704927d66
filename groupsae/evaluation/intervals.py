"""Estimates with confidence intervals by resampling documents, and their differences, paired."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float64, Int64

from groupsae.evaluation.reconstruction import LayerSums, ReconstructionSums
from groupsae.grouping.groupings import Grouping

Interval = dict[str, float | None]  # value, low, high; None where undefined
# The value, then that on each resample: so means and differences of estimates are paired.
Estimate = np.ndarray


def interval_of(estimate: Estimate, level: float) -> Interval:
    """Return the value with quantiles of its resamples, None if one of them has no value."""
    value, samples = estimate[0], estimate[1:]
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if not np.isfinite(samples).all():
        return {"value": float(value), "low": None, "high": None}
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return {"value": float(value), "low": float(low), "high": float(high)}


def per_layer(groupings: Sequence[Grouping]) -> Grouping | None:
    """Return one SAE per layer, which the others are compared with; None if it was not trained."""
    return next((each for each in groupings if each.kind == "per_layer"), None)


def table_of_groupings(
    groupings: Sequence[Grouping],
    estimates: Mapping[str, Mapping[str, Estimate]],
    show: Callable[[Estimate], Interval],
    less_is_better: Mapping[str, bool],
) -> list[dict[str, Any]]:
    """Return a row for each grouping: its estimates, and what is lost against one SAE per layer.

    Args:
        groupings: the rows.
        estimates: by name of the grouping and metric.
        show: makes an interval of an estimate.
        less_is_better: of the metrics for which `<metric>_lost` is wanted: above 0 is worse.
    """
    baseline, rows = per_layer(groupings), []
    for grouping in groupings:
        row: dict[str, Any] = {"grouping": grouping.name, "num_groups": grouping.num_groups}
        for metric, mine in estimates[grouping.name].items():
            row[metric] = show(mine)
            if baseline not in (None, grouping) and metric in less_is_better:
                more = mine - estimates[baseline.name][metric]
                row[f"{metric}_lost"] = show(more if less_is_better[metric] else -more)
        rows.append(row)
    return rows


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

    def interval(self, estimate: Estimate) -> Interval:
        """Return the percentile interval: low and high are quantiles of the resamples.

        They are None for a single document, which shows nothing about spread, and if a resample
        has no value (a ratio with a denominator of zero).
        """
        alone = np.array([estimate[0], np.nan])
        return interval_of(estimate if self.documents > 1 else alone, self.level)

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

    def estimate(
        self,
        numerator: Float64[np.ndarray, " sequence"],
        denominator: Float64[np.ndarray, " sequence"] | None = None,
    ) -> Estimate:
        """Return sum(numerator) / sum(denominator), of all and on each resample; None: ones."""
        below = np.ones(len(numerator)) if denominator is None else denominator
        value = _divide(numerator.sum(), below.sum())
        return np.concatenate([[value], self.ratio(numerator, below)])

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


def _divide(numerator: Any, denominator: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator / denominator)
