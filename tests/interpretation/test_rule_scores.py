"""Scores against definitions and against scikit-learn's formulas; nulls and baselines."""

import numpy as np
import pytest

from groupsae.interpretation.bits import packed
from groupsae.interpretation.rule_scores import (
    Prediction,
    TokenTable,
    Truth,
    adjusted,
    f1,
    scores,
)


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(0)
    z = np.where(draws.random(4000) < 0.05, draws.random(4000), 0.0)
    guess = np.where(draws.random(4000) < 0.04, draws.integers(1, 4, 4000) / 2, 0.0)
    guess[z > 0.3] = 1.5
    return guess.astype(np.float32), z.astype(np.float32)


def truth_of(z: np.ndarray) -> Truth:
    places = np.flatnonzero(z)
    return Truth.of(places, z[places], len(z))


def predicted(guess: np.ndarray) -> Prediction:
    values = np.unique(guess[guess > 0])[::-1].astype(float)
    bits = np.array([packed(guess == value) for value in values], np.uint64)
    return Prediction(values, bits.reshape(len(values), -(-len(guess) // 64)), len(guess))


def test_scores_are_their_definitions(case):
    guess, z = case
    found = scores(predicted(guess), truth_of(z))
    hit, says, fires = ((guess > 0) & (z > 0)).sum(), (guess > 0).sum(), (z > 0).sum()
    assert found["precision"] == pytest.approx(hit / says)
    assert found["recall"] == pytest.approx(hit / fires)
    assert found["f1"] == pytest.approx(2 / (says / hit + fires / hit))
    assert found["f1"] == pytest.approx(f1(packed(guess > 0), packed(z > 0)))
    assert found["iou"] == pytest.approx(hit / ((guess > 0) | (z > 0)).sum())
    assert found["pearson"] == pytest.approx(np.corrcoef(guess, z)[0, 1], rel=1e-4)
    assert found["mass_recall"] == pytest.approx(z[guess > 0].sum() / z.sum(), rel=1e-5)


def test_average_precision_is_that_of_every_threshold(case):
    guess, z = case
    area, before = 0.0, 0.0
    for threshold in sorted(set(guess.tolist()), reverse=True):
        says = guess >= threshold
        recall = (says & (z > 0)).sum() / (z > 0).sum()
        area += (recall - before) * (says & (z > 0)).sum() / says.sum()
        before = recall
    assert scores(predicted(guess), truth_of(z))["auprc"] == pytest.approx(area)


def test_more_false_alarms_lower_precision_at_the_natural_rate(case):
    guess, z = case
    silent = np.flatnonzero((guess == 0) & (z == 0))
    wider = guess.copy()
    wider[silent[: (guess > 0).sum()]] = 1.0  # twice as many predictions, none of them right
    before, after = scores(predicted(guess), truth_of(z)), scores(predicted(wider), truth_of(z))
    assert after["f1"] < 0.75 * before["f1"]

    def balanced(g):
        return ((g > 0)[z > 0].mean() + (g == 0)[z == 0].mean()) / 2

    assert balanced(wider) > 0.95 * balanced(guess)


def test_silent_latents_and_empty_predictions():
    nothing = truth_of(np.zeros(10, np.float32))
    assert scores(predicted(np.zeros(10)), nothing)["f1"] == 0
    assert scores(predicted(np.ones(10)), nothing)["auprc"] == 0
    assert adjusted(0.6, 0.2) == pytest.approx(0.5)
    assert adjusted(1.0, 1.0) == 0.0


def test_a_table_of_tokens_predicts_the_mean_activation_of_each():
    draws = np.random.default_rng(1)
    tokens = np.append(draws.integers(0, 5, 2599), 5)  # 5 is new in the score text
    tokens[:2] = 6  # twice only
    z = draws.random(2600) * (draws.random(2600) < 0.1 + 0.1 * tokens)
    z[:2] = 9.0
    early, late = z[:2000], z[2000:]
    means = np.array([early[tokens[:2000] == token].mean() for token in range(5)] + [0.0, 0.0])
    places = np.flatnonzero(early)
    area = TokenTable(tokens, 2000).auprc(places, early[places], np.flatnonzero(late))
    expected = scores(predicted(means[tokens[2000:]]), truth_of(late))["auprc"]
    assert area == pytest.approx(expected)
