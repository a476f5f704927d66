"""Partitions, their figures and the sentences for bad input."""

import re
import subprocess
import sys

import numpy as np
import pytest

from groupsae.grouping import Partition, amad, choose, partition
from groupsae.grouping.partition import build_partition, check_groups, validate_distances
from groupsae.grouping.rules import check_num_groups, check_theta
from groupsae.runtime.errors import UserError

# Worked by hand: layers at 0, 1, 3 and 6 tenths on a line.
LINE = np.abs(np.subtract.outer([0.0, 0.1, 0.3, 0.6], [0.0, 0.1, 0.3, 0.6]))


def test_amad_of_a_hand_worked_example() -> None:
    assert amad(LINE, [[0, 1, 2], [3]]) == pytest.approx((0.3 + 0.0) / 2)


def test_amad_of_singletons_is_zero() -> None:
    assert amad(LINE, [[0], [1], [2], [3]]) == 0.0


def test_amad_of_one_group_is_the_largest_distance() -> None:
    assert amad(LINE, [[0, 1, 2, 3]]) == pytest.approx(0.6)


def test_a_partition_reports_its_figures() -> None:
    made = build_partition(LINE, [[3], [0, 1, 2]], "explicit")
    assert made.groups == [[0, 1, 2], [3]]
    assert made.num_groups == 2
    assert made.diameters == pytest.approx([0.3, 0.0])
    assert made.amad == pytest.approx(0.15)
    assert made.size_weighted_amad == pytest.approx(0.3 * 3 / 4)
    assert made.max_diameter == pytest.approx(0.3)
    assert made.rule == "explicit"
    assert made.variances[1] == 0
    pairs = 2 * (3 - np.cos(np.pi * 0.1) - np.cos(np.pi * 0.2) - np.cos(np.pi * 0.3))
    assert made.variances[0] == pytest.approx(pairs / 9 / 2)
    assert made.variance == pytest.approx(3 * made.variances[0] / 4)
    assert Partition.from_json(made.to_json()) == made


def test_measured_cosines_take_the_place_of_those_of_the_mean_angles() -> None:
    cosines = np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    made = build_partition(LINE, [[0, 1], [2, 3]], "explicit", cosines)
    assert made.variances == pytest.approx([0.125, 0.125])
    with pytest.raises(UserError, match=r"shape \[3, 3\].*one for each of the \[4, 4\] distances"):
        build_partition(LINE, [[0, 1, 2, 3]], "explicit", np.eye(3))


def test_a_partition_of_an_earlier_version_has_no_variance() -> None:
    stored = build_partition(LINE, [[0, 1], [2, 3]], "explicit").to_json()
    del stored["variances"], stored["variance"]
    read = Partition.from_json(stored)
    assert read.variances == []
    assert np.isnan(read.variance)
    assert read.to_json()["variance"] is None


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([[0, 1], [3]], "layer 2 is expected, not layer 3"),
        ([[1, 2, 3]], "layer 0 is expected, not layer 1"),
        ([[0, 1]], "layer 2 is expected, not the end"),
        ([[0, 1], [1, 2, 3]], "layer 2 is expected, not layer 1"),
        ([[0, 2], [1], [3]], "layer 1 is expected, not layer 2"),
        ([[0, 1, 2, -1, 3]], "layer 0 is expected, not layer -1"),
        ([[0, 1, 2, 3, 4]], "the end is expected, not layer 4"),
    ],
)
def test_bad_groups_are_refused_with_a_sentence(groups: list[list[int]], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_partition(LINE, groups, "explicit")


@pytest.mark.parametrize(
    "groups",
    [
        [[0, 1, 2, 3], []],
        [[0, 1, 2, 3.0]],
        [],
        [0, 1, 2, 3],
        ["01"],
        "0-3",
        None,
    ],
)
def test_groups_that_are_no_lists_of_layers_are_refused(groups: object) -> None:
    with pytest.raises(UserError, match=re.escape(f"The groups are {groups!r}: write lists")):
        check_groups(groups)


def changed(row: int, column: int, value: float) -> np.ndarray:
    copy = LINE.copy()
    copy[row, column] = value
    return copy


@pytest.mark.parametrize(
    ("distances", "sentence"),
    [
        (LINE[:3], r"shape \[3, 4\]"),
        (np.zeros((0, 0)), r"shape \[0, 0\]"),
        (np.zeros((2, 2, 2)), r"shape \[2, 2, 2\]"),
        (changed(0, 2, np.nan), "between layers 0 and 2 is nan"),
        (changed(3, 1, np.inf), "between layers 3 and 1 is inf"),
        (changed(1, 2, 1.2), r"between layers 1 and 2 is 1.2, .* lie in \[0, 1\]"),
        (changed(1, 2, -0.1), "is -0.1"),
        (changed(2, 2, 0.01), "layers 2 and 2 is 0.01.*from itself must be 0"),
        (np.tril(LINE), "must be symmetric"),
    ],
)
def test_bad_distances_are_refused_with_a_sentence(distances: np.ndarray, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate_distances(distances)


def test_distances_that_differ_by_rounding_become_exactly_symmetric() -> None:
    square = validate_distances(changed(0, 1, 0.1 + 1e-12))
    assert (square == square.T).all()


def test_the_distances_of_a_single_layer_may_be_a_scalar() -> None:
    assert validate_distances(np.float64(0.0)).shape == (1, 1)


@pytest.mark.parametrize("theta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_theta_outside_its_range_is_refused(theta: float) -> None:
    with pytest.raises(UserError, match=r"theta is .*between 0 and 1"):
        choose(LINE, theta)


@pytest.mark.parametrize("theta", [0, 1, True, "0.2", None])
def test_a_theta_that_is_no_fraction_is_refused(theta: object) -> None:
    with pytest.raises(UserError, match=r"theta is .*between 0 and 1"):
        check_theta(theta)


@pytest.mark.parametrize("num_groups", [0, -1, 2.0, None])
def test_a_number_of_groups_that_is_no_count_is_refused(num_groups: object) -> None:
    with pytest.raises(UserError, match="use an integer from 1 up"):
        check_num_groups(num_groups)


def test_more_groups_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match="num_groups is 5: use an integer from 1 to 4"):
        partition(LINE, 5)


def test_an_unknown_rule_is_answered_with_all_names() -> None:
    with pytest.raises(UserError, match="rule is 'xyz': use complete, minmax, even, published"):
        partition(LINE, 3, rule="xyz")


def test_importing_grouping_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'lightning', 'hydra', 'transformers', 'omegaconf'}"
    code = f"import sys, groupsae.grouping; print(*({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""
