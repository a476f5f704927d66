"""Scores of a judge's answers: how well it tells windows in which a latent fires from others.

A score is over few windows, half of them silent; F1 and precision are brought to the natural rate,
at which a latent fires in one window in a hundred, say. Windows without an answer are counted, and
left out of the scores; `worst` and `best` show what they could change.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse
from scipy.stats import rankdata

from groupsae.evaluation.intervals import Bootstrap
from groupsae.interpretation.scores import adjusted
from groupsae.interpretation.windows import (
    DECILES,
    NEIGHBOUR,
    POSITIVE,
    RANDOM,
    SAME_TOKEN,
    Window,
)

TRIALS, OF = 50, 5  # intruders, windows of a trial
RESAMPLES, LEVEL = 500, 0.95
Yes = Float[np.ndarray, " window"]  # probability of yes; not a number: no answer


def verdict(yes: Yes, windows: Sequence[Window], rate: float) -> dict[str, Any]:
    """Return the scores of one explanation on a latent's windows.

    - tpr: share of the positives with yes (above one half); `tpr_by_decile`, from weak to strong;
    - fpr: share of the silent windows with yes, by kind;
    - balanced_accuracy: (tpr + 1 - fpr of random windows) / 2, comparable with delphi's; `hard`:
      with the silent windows that share a token or a neighbour instead;
    - auc: of positives against random silent windows;
    - precision = rate tpr / (rate tpr + (1 - rate) fpr), of random windows, and f1 of precision
      and tpr: at the natural rate.

    None where no window of a kind has an answer.

    Args:
        yes: the answers.
        windows: as many.
        rate: share of all windows in which the latent fires.
    """
    kinds = np.array([window.kind for window in windows])
    positive, random = kinds == POSITIVE, kinds == RANDOM
    tpr, fpr = _share(yes, positive), _share(yes, random)
    hard = _share(yes, (kinds == SAME_TOKEN) | (kinds == NEIGHBOUR))
    decile = np.array([window.group for window in windows])
    failed = np.isnan(yes)
    worst = np.where(failed, np.where(positive, 0.0, 1.0), yes)
    best = np.where(failed, np.where(positive, 1.0, 0.0), yes)
    precision = natural_precision(tpr, fpr, rate)
    return {
        "windows": len(windows),
        "failed": int(failed.sum()),
        "tpr": tpr,
        "tpr_by_decile": [_share(yes, positive & (decile == d)) for d in range(DECILES)],
        "fpr": {k: _share(yes, kinds == k) for k in (RANDOM, SAME_TOKEN, NEIGHBOUR)},
        "balanced_accuracy": _balanced(tpr, fpr),
        "worst": _balanced(_share(worst, positive), _share(worst, random)),
        "best": _balanced(_share(best, positive), _share(best, random)),
        "hard": _balanced(tpr, hard),
        "auc": auc(yes[positive], yes[random]),
        "precision": precision,
        "f1": harmonic(precision, tpr),
    }


def natural_precision(tpr: float | None, fpr: float | None, rate: float) -> float | None:
    """Return rate TPR / (rate TPR + (1 - rate) FPR); 0 where nothing is predicted.

    >>> round(natural_precision(0.8, 0.1, 0.01), 3)
    0.075
    """
    if tpr is None or fpr is None:
        return None
    predicted = rate * tpr + (1 - rate) * fpr
    return rate * tpr / predicted if predicted > 0 else 0.0


def harmonic(precision: float | None, recall: float | None) -> float | None:
    """Return F1 = 2 P R / (P + R)."""
    if precision is None or recall is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def auc(
    positive: Float[np.ndarray, " positive"], negative: Float[np.ndarray, " negative"]
) -> float | None:
    """Return the chance that a positive has the higher probability; ties count half."""
    positive, negative = positive[~np.isnan(positive)], negative[~np.isnan(negative)]
    if not len(positive) or not len(negative):
        return None
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)].sum()
    least = len(positive) * (len(positive) + 1) / 2
    return float((ranks - least) / (len(positive) * len(negative)))


def discriminates(yes: Yes, windows: Sequence[Window]) -> list[float]:
    """Return for each neighbour whether the explanation prefers its own latent's windows.

    1 if the mean probability is higher on the positives than on silent windows in which that
    neighbour fires, 0.5 if equal, 0 if lower.
    """
    kinds, groups = (np.array([w[i] for w in windows]) for i in (0, 5))
    own = yes[(kinds == POSITIVE) & ~np.isnan(yes)]
    found = []
    for number in np.unique(groups[kinds == NEIGHBOUR]):
        other = yes[(kinds == NEIGHBOUR) & (groups == number) & ~np.isnan(yes)]
        if len(own) and len(other):
            found.append(float((np.sign(own.mean() - other.mean()) + 1) / 2))
    return found


def _share(yes: Yes, which: Bool[np.ndarray, " window"]) -> float | None:
    answered = yes[which & ~np.isnan(yes)]
    return float((answered > 0.5).mean()) if len(answered) else None


def _balanced(tpr: float | None, fpr: float | None) -> float | None:
    return None if tpr is None or fpr is None else (tpr + 1 - fpr) / 2


# ---- over latents -------------------------------------------------------------------------


def summary(
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[tuple[np.ndarray, np.ndarray, Sequence[Window]]],
    documents: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Return the means of one task over latents, each with the null's, and their intervals.

    `mean` is over latents, `by_firings` weighted by the tokens on which each fires; `null` is the
    mean for the explanation of another latent, and adjusted = (S - S0) / (1 - S0) of the two.
    `pooled` is the balanced accuracy over all windows of all latents.

    Args:
        rows: for each latent `own`, `null` (scores of `verdict`), `rate` and `fired`.
        answers: for each latent its answers, those by the null, and the windows.
        documents: the document of every position.
        seed: of the resamples: documents and latents are drawn, with replacement.
    """
    found: dict[str, Any] = {"latents": len(rows)}
    for name in ("windows", "failed"):
        found[name] = sum(row["own"][name] for row in rows)
    fired = np.array([row["fired"] for row in rows], float)
    samples = _resampled(rows, answers, documents, seed)
    for metric in ("f1", "precision", "balanced_accuracy", "worst", "best", "hard", "auc", "tpr"):
        own, null = (
            np.array([row[side][metric] for row in rows], float) for side in ("own", "null")
        )
        entry: dict[str, Any] = {
            "mean": _mean(own),
            "by_firings": _mean(own, fired),
            "null": _mean(null),
        }
        if entry["mean"] is not None and entry["null"] is not None:
            entry["adjusted"] = adjusted(entry["mean"], entry["null"])
        if metric in samples:
            bootstrap, drawn, drawn_null = samples[metric]
            entry["interval"] = bootstrap.interval(entry["mean"], drawn)
            with np.errstate(divide="ignore", invalid="ignore"):
                better = (drawn - drawn_null) / (1 - drawn_null)
            entry["adjusted_interval"] = bootstrap.interval(entry.get("adjusted"), better)
        found[metric] = entry
    every, windows = (
        np.concatenate([yes for yes, _, _ in answers]) if answers else np.empty(0),
        [window for _, _, own in answers for window in own],
    )
    found["pooled"] = verdict(every, windows, 0.5)["balanced_accuracy"] if windows else None
    return found


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    held = ~np.isnan(values)
    if not held.any():
        return None
    return float(np.average(values[held], weights=None if weights is None else weights[held]))


def _resampled(
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[tuple[np.ndarray, np.ndarray, Sequence[Window]]],
    documents: np.ndarray,
    seed: int,
) -> dict[str, tuple[Bootstrap, np.ndarray, np.ndarray]]:
    """Return the means over latents on each resample, of both explanations."""
    if not answers:
        return {}
    owners = [documents[[window.peak for window in windows]] for _, _, windows in answers]
    bootstrap = Bootstrap(np.concatenate(owners), RESAMPLES, LEVEL, seed)
    ends = np.cumsum([len(owner) for owner in owners])
    draws = np.random.default_rng([seed, 1])
    drawn = draws.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    means: dict[str, list[np.ndarray]] = {"f1": [], "balanced_accuracy": []}
    for side in (0, 1):
        each: dict[str, list[np.ndarray]] = {name: [] for name in means}
        for row, answer, end in zip(rows, answers, ends, strict=True):
            yes = answer[:2][side]
            kinds = np.array([window.kind for window in answer[2]])
            weights = bootstrap.weights[:, end - len(yes) : end]
            tpr, fpr = (
                _weighted_share(yes, kinds == kind, weights) for kind in (POSITIVE, RANDOM)
            )
            with np.errstate(divide="ignore", invalid="ignore"):
                hits = row["rate"] * tpr
                precision = np.nan_to_num(hits / (hits + (1 - row["rate"]) * fpr))
                f1 = np.nan_to_num(2 * precision * tpr / (precision + tpr))
            lost = np.isnan(tpr) | np.isnan(fpr)
            each["f1"].append(np.where(lost, np.nan, f1))
            each["balanced_accuracy"].append((tpr + 1 - fpr) / 2)
        for name, columns in each.items():
            values = np.stack(columns, axis=1)
            held = drawn * ~np.isnan(values)
            with np.errstate(invalid="ignore"):
                means[name].append((held * np.nan_to_num(values)).sum(1) / held.sum(1))
    return {name: (bootstrap, own, null) for name, (own, null) in means.items()}


def _weighted_share(yes: Yes, which: np.ndarray, weights: np.ndarray) -> np.ndarray:
    held = which & ~np.isnan(yes)
    with np.errstate(invalid="ignore"):
        return np.asarray(weights[:, held] @ (yes[held] > 0.5) / weights[:, held].sum(1))


# ---- the window that does not belong ----------------------------------------------------------


def trials(
    windows: Sequence[Window], count: int, draws: np.random.Generator
) -> list[tuple[list[int], int]]:
    """Return sets of four positive windows and a random silent one, and its place in each."""
    kinds = np.array([window.kind for window in windows])
    own, others = np.flatnonzero(kinds == POSITIVE), np.flatnonzero(kinds == RANDOM)
    found = []
    for _ in range(count):
        chosen = draws.choice(own, OF - 1, replace=False).tolist()
        place = int(draws.integers(OF))
        chosen.insert(place, int(draws.choice(others)))
        found.append((chosen, place))
    return found


def grams(texts: Sequence[str]) -> sparse.csr_matrix:
    """Return the TF-IDF of the character 1-4-grams of each text, as rows of unit length.

    idf = ln((1 + n) / (1 + texts with it)) + 1, as scikit-learn has it.
    """
    known: dict[str, int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        for size in range(1, 5):
            for start in range(len(text) - size + 1):
                rows.append(row)
                columns.append(known.setdefault(text[start : start + size], len(known)))
    shape = (len(texts), max(len(known), 1))
    counts = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape)
    idf = np.log((1 + len(texts)) / (1 + np.asarray((counts > 0).sum(0)).ravel())) + 1
    weighted = counts.multiply(idf).tocsr()
    norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).ravel())
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(norms, 1e-12)) @ weighted)


def found_by_grams(table: sparse.csr_matrix, trial: Sequence[int]) -> int:
    """Return the place of the window with the least mean cosine to the others."""
    rows = table[list(trial)]
    cosines = np.asarray((rows @ rows.T).todense())
    return int((cosines.sum(1) - cosines.diagonal()).argmin())
