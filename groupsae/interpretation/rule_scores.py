"""How well a prediction of where a latent fires agrees with where it does, over a complete text.

All counts are exact: they are over every token of the score text, not over a balanced sample, so
precision and F1 are those at the natural rate.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64

from groupsae.interpretation.bits import contains, count, packed


class Truth(NamedTuple):
    """Where a latent fires in the score text, from its first position on."""

    places: Int[np.ndarray, " firing"]  # ascending
    acts: Float[np.ndarray, " firing"]  # activations there
    bits: UInt64[np.ndarray, " word"]  # the places as a set

    @classmethod
    def of(cls, places: np.ndarray, acts: np.ndarray, size: int) -> "Truth":
        """Return it for a text of `size` tokens."""
        flags = np.zeros(size, bool)
        flags[places] = True
        return cls(places, acts, packed(flags))


class Prediction(NamedTuple):
    """Where a latent is predicted to fire, and how strongly."""

    values: Float[np.ndarray, " value"]  # predicted activations, descending
    bits: UInt64[np.ndarray, "value word"]  # the places of each; no place has two
    size: int  # number of tokens

    @property
    def anywhere(self) -> UInt64[np.ndarray, " word"]:
        """Return where it is predicted to fire."""
        return np.bitwise_or.reduce(self.bits, initial=0)

    def at(self, places: Int[np.ndarray, " place"]) -> Float[np.ndarray, " place"]:
        """Return the predicted activation at some places, 0 where there is none."""
        found = np.zeros(len(places))
        for value, bits in zip(self.values, self.bits, strict=True):
            found[contains(bits, places)] = value
        return found


def f1(predicted: UInt64[np.ndarray, " word"], true: UInt64[np.ndarray, " word"]) -> float:
    """Return 2 TP / (predicted + true) of two sets of places; 0 if both are empty."""
    hits, says, fires = count(np.stack([predicted & true, predicted, true])).tolist()
    return 2 * hits / max(says + fires, 1)


def scores(predicted: Prediction, truth: Truth) -> dict[str, float]:
    """Return all metrics of a prediction.

    - precision = TP / predicted, recall = TP / true, f1, iou = TP / (predicted or true);
    - auprc: area under precision against recall, thresholds at every predicted value (average
      precision; equal predictions are taken together);
    - pearson: correlation of predicted and true activation over all tokens;
    - mass_recall: share of the sum of activations that lies on predicted tokens.
    """
    values, size, true = predicted.values, predicted.size, len(truth.places)
    counts, found = count(predicted.bits), count(predicted.bits & truth.bits)
    says, hits = int(counts.sum()), int(found.sum())
    at, acts = predicted.at(truth.places), truth.acts.astype(np.float64)
    means = values @ counts / size, acts.sum() / size
    covariance = at @ acts / size - means[0] * means[1]
    spread = values**2 @ counts / size - means[0] ** 2
    spread *= acts @ acts / size - means[1] ** 2
    return {
        "f1": 2 * hits / max(says + true, 1),
        "precision": hits / max(says, 1),
        "recall": hits / max(true, 1),
        "iou": hits / max(says + true - hits, 1),
        "auprc": average_precision(
            np.append(values, 0.0), np.append(counts, size - says), np.append(found, true - hits)
        ),
        "pearson": float(covariance / np.sqrt(spread)) if spread > 0 else 0.0,
        "mass_recall": float(acts[at > 0].sum() / max(acts.sum(), 1e-12)),
    }


def average_precision(
    predicted: Float[np.ndarray, " value"],
    counts: Int[np.ndarray, " value"],
    hits: Int[np.ndarray, " value"],
) -> float:
    """Return sum over thresholds of (R_n - R_n-1) P_n (scikit-learn's definition).

    Each predicted value is that of `counts` places, on `hits` of which the latent fires.
    """
    if not hits.any():
        return 0.0
    values, where = np.unique(predicted, return_inverse=True)
    every, true = (
        np.bincount(where, weights=each, minlength=len(values))[::-1].cumsum()
        for each in (counts, hits)
    )
    gained = np.diff(true, prepend=0) / true[-1]
    return float((gained * true / np.maximum(every, 1)).sum())


def adjusted(score: float, null: float) -> float:
    """Return (S - S0) / (1 - S0): 0 for the score of a wrong explanation, 1 for a perfect one."""
    return (score - null) / (1 - null) if null < 1 else 0.0


class TokenTable:
    """Predicts a latent by a table of mean activations by token: the simplest explanation.

    `tokens` are those of the text to explain, the first `explain`, and of the score text. A token
    that the former has fewer than three times is predicted to be silent.
    """

    def __init__(self, tokens: Int[np.ndarray, " position"], explain: int) -> None:
        self.early, self.late = np.split(tokens, [explain])
        self.size = int(tokens.max()) + 1
        self.counts, self.scored = (
            np.bincount(part, minlength=self.size) for part in (self.early, self.late)
        )

    def auprc(
        self,
        places: Int[np.ndarray, " firing"],
        acts: Float[np.ndarray, " firing"],
        truth: Int[np.ndarray, " place"],
    ) -> float:
        """Return its area under precision against recall.

        The latent fires at `places` of the text to explain, and at those of `truth` in the other.
        """
        sums = np.bincount(self.early[places], acts, minlength=self.size)
        means = np.where(self.counts < 3, 0.0, sums / np.maximum(self.counts, 1))
        hits, here = np.bincount(self.late[truth], minlength=self.size), self.scored > 0
        return average_precision(means[here], self.scored[here], hits[here])


def mean_of(rows: list[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over latents."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}
