"""How well a prediction of where a latent fires agrees with where it does, over a complete text.

All counts are exact: they are over every token of the score text, not over a balanced sample, so
precision and F1 are those at the natural rate.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

METRICS = ("f1", "precision", "recall", "iou", "auprc", "pearson", "mass_recall")


class Truth(NamedTuple):
    """Where a latent fires in the score text, from its first position on.

    Attributes:
        places: ascending.
        acts: activations there.
    """

    places: Int[np.ndarray, " firing"]
    acts: Float[np.ndarray, " firing"]


def f1(predicted: Bool[np.ndarray, " position"], truth: Truth) -> float:
    """Return 2 TP / (predicted + true); 0 if both are empty."""
    hits = int(predicted[truth.places].sum())
    return 2 * hits / max(int(predicted.sum()) + len(truth.places), 1)


def scores(predicted: Float[np.ndarray, " position"], truth: Truth) -> dict[str, float]:
    """Return all metrics of a predicted activation; above 0 the latent is predicted to fire.

    - precision = TP / predicted, recall = TP / true, f1, iou = TP / (predicted or true);
    - auprc: area under precision against recall, thresholds at every predicted value (average
      precision; equal predictions are taken together);
    - pearson: correlation of predicted and true activation over all tokens;
    - mass_recall: share of the sum of activations that lies on predicted tokens.
    """
    at = predicted[truth.places]
    says, hits, true = int((predicted > 0).sum()), int((at > 0).sum()), len(truth.places)
    return {
        "f1": 2 * hits / max(says + true, 1),
        "precision": hits / max(says, 1),
        "recall": hits / max(true, 1),
        "iou": hits / max(says + true - hits, 1),
        "auprc": average_precision(predicted, truth),
        "pearson": _pearson(predicted, truth),
        "mass_recall": float(truth.acts[at > 0].sum() / max(float(truth.acts.sum()), 1e-12)),
    }


def average_precision(predicted: Float[np.ndarray, " position"], truth: Truth) -> float:
    """Return sum over thresholds of (R_n - R_n-1) P_n (scikit-learn's definition)."""
    if not len(truth.places):
        return 0.0
    values, where = np.unique(predicted, return_inverse=True)
    every = np.bincount(where, minlength=len(values))[::-1].cumsum()
    true = np.bincount(where[truth.places], minlength=len(values))[::-1].cumsum()
    gained = np.diff(true, prepend=0) / len(truth.places)
    return float((gained * true / every).sum())


def _pearson(predicted: np.ndarray, truth: Truth) -> float:
    count, acts = len(predicted), truth.acts.astype(np.float64)
    p = predicted.astype(np.float64)
    covariance = float(p[truth.places] @ acts) / count - p.mean() * acts.sum() / count
    spread = p.var() * (acts @ acts / count - (acts.sum() / count) ** 2)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def adjusted(score: float, null: float) -> float:
    """Return (S - S0) / (1 - S0): 0 for the score of a wrong explanation, 1 for a perfect one."""
    return (score - null) / (1 - null) if null < 1 else 0.0


class Lookup:
    """Predicts a latent from the last tokens alone: what any explanation of tokens can reach.

    The prediction is the mean activation after the same three tokens in the text to explain; where
    those did not occur `least` times, after the same two, then after the same one.

    Args:
        tokens: tokens of the text to explain and of the score text, one after the other.
        explain: number of tokens of the first.
        offset: place of each token in its block.
        size: number of different tokens.
    """

    def __init__(
        self,
        tokens: Int[np.ndarray, " position"],
        explain: int,
        offset: Int[np.ndarray, " position"],
        size: int,
        least: int = 3,
    ) -> None:
        self.explain, self.least = explain, least
        key, self.known = np.zeros(len(tokens), np.int64), []
        for back in range(3):
            shifted = np.concatenate([np.full(back, -1), tokens[: len(tokens) - back]])
            # numbered again at each length, so that three tokens fit into 64 bits
            key = np.unique(key * (size + 1) + shifted + 1, return_inverse=True)[1].astype(
                np.int64
            )
            complete = offset >= back
            counts = np.bincount(key[:explain][complete[:explain]], minlength=int(key.max()) + 1)
            self.known.append((key, complete, counts))

    def predict(
        self,
        places: Int[np.ndarray, " firing"],
        acts: Float[np.ndarray, " firing"],
        longest: int = 3,
    ) -> Float[np.ndarray, " position"]:
        """Return the prediction for the score text from firings in the text to explain.

        `longest` 1 predicts from the token alone ("unigram").
        """
        found = np.zeros(len(self.known[0][0]) - self.explain)
        for key, complete, counts in self.known[:longest]:
            inside = complete[places]
            sums = np.bincount(key[places[inside]], acts[inside], minlength=len(counts))
            here = key[self.explain :]
            enough = complete[self.explain :] & (counts[here] >= self.least)
            found = np.where(enough, sums[here] / np.maximum(counts[here], 1), found)
        return found


def entropy_of_tokens(tokens: Int[np.ndarray, " firing"]) -> float:
    """Return the entropy of the tokens that a latent fires on, in bits."""
    counts = np.unique(tokens, return_counts=True)[1] / max(len(tokens), 1)
    return float(-(counts * np.log2(counts)).sum())


def mean_of(rows: list[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over latents."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}
