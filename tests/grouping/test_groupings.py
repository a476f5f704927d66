"""The groupings that a plan's SAEs make: names, shared partitions, what theta picks."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsae.grouping.choices import ByAmad, ByCount, Choice, Even, Explicit, PerLayer
from groupsae.grouping.groupings import groupings
from groupsae.grouping.rules import choose, curve
from tests.helpers.partitions import LINE, every, fast, groupable, last_layers, matrices, rules


@fast
@given(matrices(), rules, last_layers, st.sampled_from([0.01, 0.1, 0.2, 0.5]))
def test_every_partition_comes_once_with_all_rules_that_made_it(
    distances: np.ndarray, names: list[str], last_layer: str, theta: float
) -> None:
    plan = every(rules=names, last_layer=last_layer, theta=theta).plan(distances)
    grouped = groupable(distances, last_layer)
    found = groupings(plan)
    assert len({each.name for each in found}) == len(found)
    made: dict[str, set[str]] = {}
    picked: dict[str, set[str]] = {}
    for rule in names:
        for each in curve(grouped, rule):
            made.setdefault(str(each.groups), set()).add(rule)
        picked.setdefault(str(choose(grouped, theta, rule).groups), set()).add(rule)
    full = [each for each in found if each.partition is not None]
    assert {str(each.partition.groups) for each in full} == set(made)
    for each in full:
        key = str(each.partition.groups)
        assert len(each.rules) == len(set(each.rules))
        assert set(each.rules) == made[key]
        assert len(each.chosen_by) == len(set(each.chosen_by))
        assert set(each.chosen_by) == picked.get(key, set())
        assert each.num_groups == len(each.partition.groups)
        single = each.num_groups == len(grouped)
        assert each.kind == ("per_layer" if single else "groups")
        first = next(rule for rule in names if rule in made[key])
        assert each.name == ("per_layer" if single else f"{first}-{each.num_groups}")
    assert str(found[0].partition.groups) == str(plan.partition.groups)
    assert names[0] in found[0].chosen_by


@fast
@given(matrices(), rules, last_layers)
def test_every_grouping_serves_every_layer_with_a_member(
    distances: np.ndarray, names: list[str], last_layer: str
) -> None:
    plan = every(rules=names, last_layer=last_layer).plan(distances)
    members = {member.name: member for member in plan.members}
    n, used = len(groupable(distances, last_layer)), set()
    for each in groupings(plan):
        assert each.grouped == list(range(n))
        assert sorted(each.sae_of_layer) == list(range(n + (last_layer == "own")))
        for layer, name in each.sae_of_layer.items():
            assert layer in members[name].layers
        if last_layer == "own":
            assert each.sae_of_layer[n] == f"layers.{n}"
        if each.partition is not None:
            by_group = {members[each.sae_of_layer[g[0]]].name for g in each.partition.groups}
            assert len(by_group) == each.num_groups
        else:
            assert all(
                members[each.sae_of_layer[x]].width == each.num_groups / n for x in each.grouped
            )
        used |= set(each.sae_of_layer.values())
    assert used == set(members)  # nothing is trained that no grouping needs


def test_the_order_is_the_chosen_one_then_by_rule_and_number_then_smaller() -> None:
    plan = every(rules=["complete", "even"], smaller=[3, 1]).plan(LINE)
    assert [each.name for each in groupings(plan)] == [
        "complete-2",
        "complete-1",
        "complete-3",
        "complete-4",
        "per_layer",
        "even-3",
        "even-4",
        "smaller-1",
        "smaller-3",
    ]


def test_partitions_that_rules_agree_on_are_merged() -> None:
    plan = every(rules=["complete", "even"], smaller=[]).plan(LINE)
    by_name = {each.name: each for each in groupings(plan)}
    assert by_name["complete-2"].rules == ["complete", "even"]  # [0, 1, 2], [3, 4]
    assert by_name["complete-2"].chosen_by == ["complete", "even"]
    assert by_name["complete-1"].rules == ["complete", "even"]
    assert by_name["per_layer"].rules == ["complete", "even"]
    assert by_name["complete-3"].rules == ["complete"]
    assert by_name["complete-3"].chosen_by == []


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (
            ByAmad(theta=0.2, rule="complete", last_layer="own"),
            {"name": "complete-2", "kind": "groups", "chosen_by": ["complete"]},
        ),
        (
            ByCount(num_groups=3, rule="minmax", last_layer="own"),
            {"name": "minmax-3", "kind": "groups", "chosen_by": []},
        ),
        (
            Even(num_groups=2, last_layer="group"),
            {"name": "even-2", "kind": "groups", "chosen_by": []},
        ),
        (
            PerLayer(last_layer="own"),
            {"name": "per_layer", "kind": "per_layer", "chosen_by": []},
        ),
        (
            Explicit(groups=[[0, 1, 2, 3], [4]], last_layer="skip"),
            {"name": "explicit-2", "kind": "groups", "chosen_by": []},
        ),
    ],
)
def test_an_ordinary_plan_has_one_grouping(choice: Choice, expected: dict[str, Any]) -> None:
    plan = choice.plan(LINE)
    (only,) = groupings(plan)
    assert {key: getattr(only, key) for key in expected} == expected
    assert only.partition == plan.partition
    assert set(only.sae_of_layer.values()) == set(plan.names)
