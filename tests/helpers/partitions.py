"""Distances and choices for the tests of grouping."""

from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from groupsae.grouping.choices import All
from groupsae.grouping.rules import RULES

fast = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

POINTS = np.array([0.0, 0.1, 0.12, 0.3, 0.31, 0.9])
LINE = np.abs(np.subtract.outer(POINTS, POINTS))  # 6 layers; the last one is far away


def every(**changes: Any) -> All:
    """Return the choice as conf/groups/all.yaml makes it, but for the changes."""
    values = {"rules": ["complete"], "theta": 0.2, "smaller": "chosen", "last_layer": "own"}
    return All(**(values | changes))


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Draw distances of 2 to 9 layers, most of them Robinson: growing away from the diagonal.

    No two of them are equal, as in real measurements.
    """
    n, seed = draw(st.integers(2, 9)), draw(st.integers(0, 2**32 - 1))
    chance = np.random.default_rng(seed)
    square = np.zeros((n, n))
    robinson = draw(st.sampled_from([True, True, True, False]))
    for length in range(1, n):
        for i in range(n - length):
            j = i + length
            shorter = max(square[i, j - 1], square[i + 1, j]) if robinson else 0.0
            square[i, j] = square[j, i] = shorter + chance.random() ** 3
    return square / (1.01 * square.max())


rules = st.lists(st.sampled_from(sorted(RULES)), min_size=1, max_size=4, unique=True)
last_layers = st.sampled_from(["own", "skip", "group"])


def groupable(distances: np.ndarray, last_layer: str) -> np.ndarray:
    n = len(distances) - (last_layer != "group")
    return distances[:n, :n]
