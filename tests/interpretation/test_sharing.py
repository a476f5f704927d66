"""How layers share a latent, against definitions and planted cases."""

import numpy as np
import pytest

from groupsae.interpretation.sharing import (
    badge_of,
    cofiring,
    divergence,
    drift,
    kind_of,
    shares,
)


def test_shares_range_and_gap():
    found = shares(np.array([0.0, 0.4, 0.0, 0.4, 0.02]))
    assert found["shares"] == pytest.approx([0, 0.4 / 0.82, 0, 0.4 / 0.82, 0.02 / 0.82])
    assert found["range"] == [1, 3]
    assert found["gap"]
    even = shares(np.full(4, 0.1))
    assert even["effective_layers"] == pytest.approx(4)
    assert even["range"] == [0, 3]
    assert not even["gap"]
    assert shares(np.zeros(3))["range"] is None


def test_persistence_and_its_value_under_independence():
    draws, tokens = np.random.default_rng(0), 20_000
    fires = draws.random((3, tokens)) < np.array([[0.2], [0.1], [0.3]])
    *_, alone = cofiring([np.flatnonzero(f) for f in fires], tokens)
    any_layer = fires.any(0)
    assert alone["persistence"] == pytest.approx(fires[:, any_layer].mean())
    assert alone["persistence"] == pytest.approx(alone["independent"], abs=0.01)
    *_, same = cofiring([np.flatnonzero(fires[0])] * 3, tokens)
    assert same["persistence"] == pytest.approx(1)
    assert same["independent"] < 0.6


def test_cofiring_is_by_sets():
    jaccard, contained, _ = cofiring([np.array([1, 2, 3, 4]), np.array([3, 4, 5])], 10)
    assert jaccard == pytest.approx(np.array([[1, 2 / 5], [2 / 5, 1]]))
    assert contained == pytest.approx(np.array([[1, 2 / 4], [2 / 3, 1]]))


def test_divergence_is_in_bits():
    a, b = np.array([0, 0, 1, 1]), np.array([2, 2, 3, 3])
    assert divergence(a, a, 4) == pytest.approx(0)
    assert divergence(a, b, 4) == pytest.approx(1)


def test_drift_finds_other_tokens_and_not_another_sample():
    draws, n = np.random.default_rng(1), 400
    documents = draws.integers(0, 40, n)
    before, after = draws.integers(0, 10, n), draws.integers(10, 20, n)
    amount, p = drift((before, documents), (after, documents), 20, draws)
    assert amount > 0.8
    assert p == pytest.approx(1 / 200)
    amount, p = drift((before, documents), (draws.integers(0, 10, n), documents), 10, draws)
    assert abs(amount) < 0.05
    assert p is None


def test_a_difference_between_documents_is_no_drift():
    """The layers fire in other documents, and within each document on the same tokens."""
    draws, n = np.random.default_rng(2), 300
    p_values = []
    for _ in range(5):
        documents = draws.integers(0, 6, 2 * n)
        tokens = documents * 10 + draws.integers(0, 3, 2 * n)  # each document has its own words
        late = draws.random(2 * n) < np.where(documents < 3, 0.02, 0.98)
        a, b = ((tokens[x], documents[x]) for x in (~late, late))
        amount, p = drift(a, b, 63, draws)
        assert amount > 0.25
        p_values.append(p)
    assert np.median(p_values) > 0.05


def test_kinds():
    everywhere = {"tau": (1.0, 1.0), "drifted": 0.0, "q": None}
    assert kind_of(contained=(0.9, 0.9), rates=(0.1, 0.1), **everywhere) == "same"
    assert kind_of(contained=(0.5, 1.0), rates=(0.1, 0.05), **everywhere) == "narrower"
    assert kind_of(contained=(1.0, 0.5), rates=(0.05, 0.1), **everywhere) == "broader"
    apart = {"tau": (0.1, 0.0), "contained": (0.1, 0.1), "rates": (0.1, 0.1)}
    assert kind_of(drifted=0.6, q=0.01, **apart) == "different"
    assert kind_of(drifted=0.6, q=0.2, **apart) == "unclear"
    nothing = (np.nan, np.nan)
    assert kind_of(nothing, (0.1, 0.1), (0.1, 0.1), 0.6, 0.01) != "same"
    assert badge_of(["same", "different"]) == "means different things"
    assert badge_of([]) == ""
