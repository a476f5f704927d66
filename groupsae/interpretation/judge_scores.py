"""Scores of a judge's answers: how well it tells windows in which a latent fires from others.

A score is over few windows, half of them silent; F1 and precision are brought to the natural rate,
at which a latent fires in one window in a hundred, say. Windows without an answer are counted, and
left out of the scores; `worst` and `best` show what they could change.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import mannwhitneyu

from groupsae.evaluation.intervals import Bootstrap
from groupsae.interpretation.judge_windows import (
    DECILES,
    NEIGHBOUR,
    POSITIVE,
    RANDOM,
    SAME_TOKEN,
    LatentWindows,
    Window,
)
from groupsae.interpretation.rule_scores import adjusted

RESAMPLES, LEVEL = 500, 0.95
METRICS = ("f1", "precision", "balanced_accuracy", "worst", "best", "hard", "auc", "tpr")
RESAMPLED = ("f1", "balanced_accuracy")  # of these there are intervals
Yes = Float[np.ndarray, " window"]  # probability of yes; not a number: no answer


def verdict(yes: Yes, windows: Sequence[Window], rate: float) -> dict[str, Any]:
    """Return the scores of one explanation on a latent's windows.

    - tpr: share of the positives with yes (above one half); `tpr_by_decile`, from weak to strong;
    - fpr: share of the silent windows with yes, by kind;
    - balanced_accuracy: (tpr + 1 - fpr of random windows) / 2, to compare with other work; `hard`:
      with the silent windows that share a token or a neighbour instead;
    - auc: of positives against random silent windows;
    - precision = rate tpr / (rate tpr + (1 - rate) fpr), of random windows, and f1 of precision
      and tpr: at the natural rate.

    None where no window of a kind has an answer. The rate is the share of all windows in which the
    latent fires.
    """
    kinds = np.array([window.kind for window in windows])
    deciles = np.array([window.group for window in windows])
    positive, random, failed = kinds == POSITIVE, kinds == RANDOM, np.isnan(yes)
    hard = (kinds == SAME_TOKEN) | (kinds == NEIGHBOUR)

    def balanced(yes: Yes, silent: np.ndarray) -> float:
        return (_share(yes, positive) + 1 - _share(yes, silent)) / 2

    tpr, fpr = _share(yes, positive), _share(yes, random)
    precision, f1 = at_natural_rate(tpr, fpr, rate)
    return {
        "windows": len(windows),
        "failed": int(failed.sum()),
        "tpr": _known(tpr),
        "tpr_by_decile": [_known(_share(yes, positive & (deciles == d))) for d in range(DECILES)],
        "fpr": {k: _known(_share(yes, kinds == k)) for k in (RANDOM, SAME_TOKEN, NEIGHBOUR)},
        "balanced_accuracy": _known(balanced(yes, random)),
        "worst": _known(balanced(np.where(failed, ~positive, yes), random)),
        "best": _known(balanced(np.where(failed, positive, yes), random)),
        "hard": _known(balanced(yes, hard)),
        "auc": _known(auc(yes[positive], yes[random])),
        "precision": _known(precision),
        "f1": _known(f1),
    }


def _share(yes: Yes, which: Bool[np.ndarray, " window"], weights: Any = 1.0) -> Any:
    """Return the share with yes of some windows, for each row of weights; nan without answers."""
    counted = weights * (which & ~np.isnan(yes))
    with np.errstate(invalid="ignore"):
        return counted @ (yes > 0.5) / counted.sum(-1)


def _known(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def at_natural_rate(tpr: Any, fpr: Any, rate: float) -> tuple[Any, Any]:
    """Return precision = rate TPR / (rate TPR + (1 - rate) FPR), and F1 of it and TPR.

    Both are 0 where nothing is predicted.

    >>> [round(float(each), 3) for each in at_natural_rate(0.8, 0.1, 0.01)]
    [0.075, 0.137]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        predicted = rate * tpr + (1 - rate) * fpr
        precision = np.where(predicted == 0, 0.0, np.divide(rate * tpr, predicted))
        f1 = np.divide(2 * precision * tpr, precision + tpr)
    return precision, np.where(precision + tpr == 0, 0.0, f1)


def auc(
    positive: Float[np.ndarray, " positive"], negative: Float[np.ndarray, " negative"]
) -> float:
    """Return the chance that a positive has the higher probability; ties count half.

    Not a number if one side has no answer.
    """
    positive, negative = positive[~np.isnan(positive)], negative[~np.isnan(negative)]
    if not len(positive) or not len(negative):
        return np.nan
    found = mannwhitneyu(positive, negative).statistic
    return float(found / (len(positive) * len(negative)))


def discriminates(yes: Yes, windows: Sequence[Window]) -> list[float]:
    """Return for each neighbour whether the explanation prefers its own latent's windows.

    1 if the mean probability is higher on the positives than on silent windows in which that
    neighbour fires, 0.5 if equal, 0 if lower.
    """
    kinds = np.array([window.kind for window in windows])
    groups = np.array([window.group for window in windows])
    own = yes[(kinds == POSITIVE) & ~np.isnan(yes)]
    found = []
    for number in np.unique(groups[kinds == NEIGHBOUR]):
        other = yes[(kinds == NEIGHBOUR) & (groups == number) & ~np.isnan(yes)]
        if len(own) and len(other):
            found.append(float((np.sign(own.mean() - other.mean()) + 1) / 2))
    return found


def summary(
    latents: Sequence[tuple[LatentWindows, tuple[Yes, Yes]]], documents: np.ndarray, seed: int
) -> dict[str, Any]:
    """Return the means of one task over latents, each with the null's, and their intervals.

    `mean` is over latents, `by_firings` weighted by the tokens on which each fires; `null` is the
    mean for the explanation of another latent, and adjusted = (S - S0) / (1 - S0) of the two.
    `pooled` is the balanced accuracy over all windows of all latents, as delphi gives it.
    Of each latent there is what the judge saw, and its answers by both explanations. Resamples
    draw documents, of which there is a number for every position, and latents, with replacement.
    """
    sides = [
        [verdict(yes[side], shown.score, shown.rate) for shown, yes in latents] for side in (0, 1)
    ]
    found: dict[str, Any] = {"latents": len(latents)}
    for name in ("windows", "failed"):
        found[name] = sum(each[name] for each in sides[0])
    fired = np.array([shown.fired for shown, _ in latents], float)
    samples = _resampled(latents, documents, seed) if latents else None
    for metric in METRICS:
        own, null = (np.array([each[metric] for each in side], float) for side in sides)
        mean, null_mean = mean_of_known(own), mean_of_known(null)
        entry: dict[str, Any] = {
            "mean": mean,
            "by_firings": mean_of_known(own, fired),
            "null": null_mean,
        }
        if mean is not None and null_mean is not None:
            entry["adjusted"] = adjusted(mean, null_mean)
        if samples is not None and metric in RESAMPLED:
            bootstrap, drawn = samples
            one, other = drawn[metric]
            with np.errstate(divide="ignore", invalid="ignore"):
                better = (one - other) / (1 - other)
            entry["interval"] = bootstrap.interval(np.array([mean, *one], float))
            by_null = np.array([entry.get("adjusted"), *better], float)
            entry["adjusted_interval"] = bootstrap.interval(by_null)
        found[metric] = entry
    every = np.concatenate([yes[0] for _, yes in latents]) if latents else np.empty(0)
    windows = [window for shown, _ in latents for window in shown.score]
    found["pooled"] = verdict(every, windows, 0.5)["balanced_accuracy"] if windows else None
    return found


def mean_of_known(values: Any, weights: np.ndarray | None = None) -> float | None:
    """Return the mean of those values that are numbers, None if there are none."""
    values = np.array(values, float)
    held = ~np.isnan(values)
    if not held.any():
        return None
    return float(np.average(values[held], weights=None if weights is None else weights[held]))


def _resampled(
    latents: Sequence[tuple[LatentWindows, tuple[Yes, Yes]]], documents: np.ndarray, seed: int
) -> tuple[Bootstrap, dict[str, list[np.ndarray]]]:
    """Return the means over latents on each resample, by metric: of both explanations."""
    owners = [documents[[window.peak for window in shown.score]] for shown, _ in latents]
    bootstrap = Bootstrap(np.concatenate(owners), RESAMPLES, LEVEL, seed)
    weights = np.split(bootstrap.weights, np.cumsum([len(each) for each in owners])[:-1], axis=1)
    draws = np.random.default_rng([seed, 1])
    drawn = draws.multinomial(len(latents), np.full(len(latents), 1 / len(latents)), RESAMPLES)
    means: dict[str, list[np.ndarray]] = {name: [] for name in RESAMPLED}
    for side in (0, 1):
        columns = []
        for (shown, yes), weight in zip(latents, weights, strict=True):
            kinds = np.array([window.kind for window in shown.score])
            tpr, fpr = (_share(yes[side], kinds == kind, weight) for kind in (POSITIVE, RANDOM))
            columns.append([at_natural_rate(tpr, fpr, shown.rate)[1], (tpr + 1 - fpr) / 2])
        for name, values in zip(RESAMPLED, np.moveaxis(np.array(columns), 0, -1), strict=True):
            held = drawn * ~np.isnan(values)
            with np.errstate(invalid="ignore"):
                means[name].append((held * np.nan_to_num(values)).sum(1) / held.sum(1))
    return bootstrap, means


def trials(
    windows: Sequence[Window], count: int, draws: np.random.Generator
) -> list[tuple[list[int], int]]:
    """Return sets of four positive windows and a random silent one, and its place in each."""
    kinds = np.array([window.kind for window in windows])
    own, others = np.flatnonzero(kinds == POSITIVE), np.flatnonzero(kinds == RANDOM)
    found = []
    for _ in range(count):
        chosen = draws.choice(own, 4, replace=False).tolist()
        place = int(draws.integers(5))
        chosen.insert(place, int(draws.choice(others)))
        found.append((chosen, place))
    return found
