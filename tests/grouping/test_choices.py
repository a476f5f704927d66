"""The options of conf/groups: labels, early checks, plans and their stored form."""

import json
from typing import Any

import numpy as np
import pytest

from groupsae.grouping import partition
from groupsae.grouping.choices import (
    All,
    Budget,
    ByAmad,
    ByCount,
    Choice,
    Even,
    Explicit,
    PerLayer,
    Published,
)
from groupsae.grouping.partition import build_partition
from groupsae.grouping.plan import GroupPlan
from groupsae.grouping.rules import curve
from groupsae.runtime.errors import UserError

POINTS = np.array([0.0, 0.1, 0.12, 0.3, 0.31, 0.9])
DISTANCES = np.abs(np.subtract.outer(POINTS, POINTS))  # 6 layers; the last one is far away

ALL = [
    ByAmad(theta=0.2, rule="complete", last_layer="own"),
    ByCount(num_groups=2, rule="minmax", last_layer="skip"),
    Even(num_groups=3, last_layer="group"),
    PerLayer(last_layer="own"),
    Explicit(groups=[[0, 1], [2, 3, 4]], last_layer="own"),
    Published(theta=0.2, last_layer="own"),
    Budget(max_fvu_loss=0.1),
    Budget(saving=0.5, last_layer="skip"),
]


@pytest.mark.parametrize(
    ("choice", "label"),
    [
        (ByAmad(theta=0.2, rule="complete", last_layer="own"), "amad-0.2"),
        (ByAmad(theta=0.15, rule="minmax", last_layer="skip"), "amad-0.15-minmax-last-skip"),
        (ByCount(num_groups=6, rule="complete", last_layer="own"), "count-6"),
        (
            ByCount(num_groups=6, rule="published", last_layer="group"),
            "count-6-published-last-group",
        ),
        (Even(num_groups=6, last_layer="own"), "even-6"),
        (PerLayer(last_layer="own"), "per_layer"),
        (Published(theta=0.2, last_layer="own"), "published-0.2"),
        (Budget(max_fvu_loss=0.1), "budget-loss-0.1"),
        (Budget(saving=0.5, last_layer="skip"), "budget-saving-0.5-last-skip"),
    ],
)
def test_the_label_names_what_was_chosen(choice: Choice, label: str) -> None:
    assert choice.label == label


def test_the_label_of_explicit_groups_follows_their_content() -> None:
    label = Explicit(groups=[[0, 1], [2]], last_layer="own").label
    assert label == Explicit(groups=[(2,), (1, 0)], last_layer="own").label
    assert label != Explicit(groups=[[0], [1, 2]], last_layer="own").label
    assert len(label) == len("explicit-") + 8


def test_thetas_that_differ_have_different_labels() -> None:
    a, b = (ByAmad(theta=t, rule="complete", last_layer="own") for t in (0.2, 0.2000000001))
    assert a.label != b.label


@pytest.mark.parametrize(
    ("choice", "saes"),
    [
        (ALL[0], [[0, 1, 2], [3, 4], [5]]),
        (ALL[1], [[0, 1, 2], [3, 4]]),
        (ALL[2], [[0, 1], [2, 3], [4, 5]]),
        (ALL[3], [[0], [1], [2], [3], [4], [5]]),
        (ALL[4], [[0, 1], [2, 3, 4], [5]]),
    ],
)
def test_plans_hold_the_expected_saes(choice: Choice, saes: list[list[int]]) -> None:
    assert choice.plan(DISTANCES).saes == saes


def test_the_last_layer_is_no_part_of_the_distances_that_choose() -> None:
    far, near = DISTANCES.copy(), DISTANCES.copy()
    near[5, :5] = near[:5, 5] = 0.01
    for choice in (ALL[0], ALL[1], ALL[5]):
        assert choice.plan(far).hash == choice.plan(near).hash


@pytest.mark.parametrize(
    ("last_layer", "saes"),
    [
        ("own", [[0, 1, 2, 3, 4], [5]]),
        ("skip", [[0, 1, 2, 3, 4]]),
        ("group", [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_the_last_layer_is_owned_skipped_or_grouped(last_layer: str, saes: list[Any]) -> None:
    choice = ByCount(num_groups=1, rule="complete", last_layer=last_layer)
    assert choice.plan(DISTANCES).saes == saes


@pytest.mark.parametrize("bound", [0.0, 0.001, 0.02, 0.1, 0.3, 5])
def test_a_bound_on_the_loss_gives_the_fewest_groups_that_are_predicted_to_keep_it(
    bound: float,
) -> None:
    found = curve(DISTANCES[:5, :5], "variance")
    expected = next(each for each in found if 2.4 * each.variance <= bound)
    assert Budget(max_fvu_loss=bound).plan(DISTANCES).partition == expected


def test_a_bound_of_zero_allows_for_the_rounding_of_measured_cosines() -> None:
    cosines = np.cos(np.pi * DISTANCES) * (1 - 1e-8)
    choice = Budget(max_fvu_loss=0, last_layer="group")
    assert choice.plan(DISTANCES, cosines).partition.num_groups == 6


def test_a_saving_needs_no_bound_on_the_loss() -> None:
    plan = Budget(max_fvu_loss=None, saving=0.5).plan(DISTANCES)
    assert plan == Budget(saving=0.5).plan(DISTANCES)


@pytest.mark.parametrize(
    ("saving", "last_layer", "saes"),
    [
        (0.0, "own", 6), (0.5, "own", 3), (0.51, "own", 2), (2 / 3, "own", 2), (0.4, "skip", 3),
        (0.8, "skip", 1), (0.5, "group", 3),
    ],
)  # fmt: skip
def test_a_saving_gives_the_most_groups_that_reach_it(
    saving: float, last_layer: str, saes: int
) -> None:
    plan = Budget(saving=saving, last_layer=last_layer).plan(DISTANCES)
    assert len(plan.saes) == saes
    assert plan.partition.rule == "variance"


def test_a_saving_that_one_group_does_not_reach_is_refused() -> None:
    with pytest.raises(UserError, match=r"leaves no SAE.*one group for all of them saves 0\.67"):
        Budget(saving=0.7).check(6)


def test_the_names_of_saes_are_folder_safe() -> None:
    plan = Explicit(groups=[[0, 1, 2], [3], [4]], last_layer="own").plan(DISTANCES)
    assert plan.names == ["layers.0-2", "layers.3", "layers.4", "layers.5"]


@pytest.mark.parametrize("choice", ALL)
def test_a_plan_survives_json_exactly(choice: Choice) -> None:
    plan = choice.plan(DISTANCES / 3)
    stored = json.loads(json.dumps({"model": "anything else", **plan.to_json()}))
    assert GroupPlan.from_json(stored) == plan
    assert stored["amad"] == plan.partition.amad


@pytest.mark.parametrize("choice", [*ALL, All(rules=["minmax", "variance"])])
def test_measured_cosines_reach_the_groups_without_the_last_layer(choice: Choice) -> None:
    cosines = np.cos(np.pi * DISTANCES[::-1, ::-1] / 2)
    plan = choice.plan(DISTANCES, cosines)
    for part in plan.partitions:
        n = part.num_layers
        expected = build_partition(DISTANCES[:n, :n], part.groups, part.rule, cosines[:n, :n])
        assert part == expected
        if part.rule == "variance":
            assert part == partition(
                DISTANCES[:n, :n], part.num_groups, "variance", cosines[:n, :n]
            )


def test_a_stored_plan_that_was_edited_is_refused() -> None:
    stored = ALL[4].plan(DISTANCES).to_json()
    stored["groups"] = [[0], [1, 2, 3, 4]]
    with pytest.raises(UserError, match="changed by hand"):
        GroupPlan.from_json(stored)


def test_a_stored_plan_that_lacks_a_key_is_refused() -> None:
    stored = ALL[4].plan(DISTANCES).to_json()
    del stored["last_layer"]
    with pytest.raises(UserError, match="lack 'last_layer'"):
        GroupPlan.from_json(stored)


def test_equal_saes_have_equal_hashes_however_they_were_chosen() -> None:
    by_hand = Explicit(groups=[[0], [1], [2], [3], [4]], last_layer="own").plan(DISTANCES)
    assert by_hand.hash == PerLayer(last_layer="own").plan(DISTANCES).hash
    assert by_hand.hash != PerLayer(last_layer="skip").plan(DISTANCES).hash


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Budget(max_fvu_loss=-1), "max_fvu_loss is -1: use a number from 0 up"),
        (lambda: Budget(max_fvu_loss=None), "max_fvu_loss is None: use a number from 0 up"),
        (lambda: Budget(saving=1), "saving is 1: use a number from 0 to below 1"),
        (lambda: ByAmad(theta=1.2, rule="complete", last_layer="own"), "theta is 1.2"),
        (
            lambda: ByAmad(theta=0.2, rule="complet", last_layer="own"),
            "rule is 'complet': use complete",
        ),
        (lambda: ByCount(num_groups=0, rule="even", last_layer="own"), "num_groups is 0"),
        (
            lambda: ByCount(num_groups=2, rule="Even", last_layer="own"),
            "rule is 'Even': use complete, minmax, even",
        ),
        (lambda: Even(num_groups=-2, last_layer="own"), "num_groups is -2"),
        (lambda: PerLayer(last_layer="none"), "last_layer is 'none': use own"),
        (
            lambda: Explicit(groups=[[0, 1], [1]], last_layer="own"),
            "layer 2 is expected, not layer 1",
        ),
        (lambda: Explicit(groups=[[0, 1], [3]], last_layer="own"), "layer 2 is expected, not"),
        (lambda: Published(theta=0.0, last_layer="own"), "theta is 0.0"),
    ],
)
def test_bad_values_are_refused_at_construction(make: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (
            ByCount(num_groups=6, rule="even", last_layer="own"),
            "from 1 to 5, the number of layers to group",
        ),
        (Even(num_groups=6, last_layer="skip"), "from 1 to 5, the number of layers to group"),
        (Even(num_groups=7, last_layer="group"), "from 1 to 6, the number of layers to group"),
        (
            Explicit(groups=[[0, 1, 2, 3, 4]], last_layer="group"),
            "layer 5 is expected, not the end",
        ),
        (Explicit(groups=[[0, 1, 2, 3, 4, 5]], last_layer="own"), "Use groups.last_layer=group"),
        (Explicit(groups=[[0, 1, 2, 3, 4], [5]], last_layer="skip"), "name the last layer, 5"),
        (Explicit(groups=[list(range(9))], last_layer="own"), "name the last layer, 5"),
        (
            Explicit(groups=[list(range(9))], last_layer="group"),
            "the end is expected, not layer 6",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_any_work(
    choice: Choice, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        choice.check(6)


@pytest.mark.parametrize("choice", ALL)
def test_a_choice_that_fits_the_model_is_accepted(choice: Choice) -> None:
    choice.check(6)


def test_a_model_of_one_layer_needs_last_layer_group() -> None:
    with pytest.raises(UserError, match="Use groups.last_layer=group"):
        PerLayer(last_layer="own").check(1)
    assert PerLayer(last_layer="group").plan(np.zeros((1, 1))).saes == [[0]]
