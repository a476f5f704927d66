"""groups=all: one plan with every partition of several rules, and smaller SAEs to compare."""

import hashlib
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsae.grouping.choices import ByAmad
from groupsae.grouping.plan import GroupPlan, check_smaller
from groupsae.grouping.rules import choose, curve
from groupsae.runtime.errors import UserError
from tests.helpers.partitions import LINE, every, fast, groupable, last_layers, matrices, rules


@fast
@given(matrices(), rules, last_layers)
def test_the_plan_holds_every_partition_of_every_rule(
    distances: np.ndarray, names: list[str], last_layer: str
) -> None:
    plan = every(rules=names, last_layer=last_layer).plan(distances)
    grouped = groupable(distances, last_layer)
    assert list(plan.others) == [each for rule in names for each in curve(grouped, rule)]
    assert plan.partition == choose(grouped, 0.2, names[0])
    assert plan.theta == 0.2
    assert plan.last_layer == last_layer


@fast
@given(matrices(), rules, last_layers, st.sets(st.integers(1, 8)))
def test_each_distinct_group_is_one_member_and_no_group_lacks_one(
    distances: np.ndarray, names: list[str], last_layer: str, sizes: set[int]
) -> None:
    n = len(groupable(distances, last_layer))
    sizes = {size for size in sizes if size < n}
    plan = every(rules=names, last_layer=last_layer, smaller=sorted(sizes)).plan(distances)
    members = plan.members
    assert len({member.name for member in members}) == len(members)
    full = [member.layers for member in members if member.width == 1]
    groups = {tuple(group) for each in plan.partitions for group in each.groups}
    own = {(n,)} if last_layer == "own" else set()
    assert len(full) == len(groups | own)
    assert set(map(tuple, full)) == groups | own
    assert members[: len(plan.saes)] == [
        (name, layers, 1.0) for name, layers in zip(plan.names, plan.saes, strict=True)
    ]
    smaller = [member for member in members if member.width < 1]
    assert sorted((m.layers[0], m.width) for m in smaller) == sorted(
        (layer, size / n) for size in sizes for layer in range(n)
    )
    # the cost of each size is that of its number of groups, the last layer alike on both sides
    for size in sizes:
        mine = [m.width for m in smaller if m.name.endswith(f".smaller-{size}")]
        assert sum(mine) == pytest.approx(size)
    assert set(map(tuple, plan.slots)) == set(map(tuple, full))
    assert len(plan.slots) == len(full)


@fast
@given(matrices(), rules, last_layers)
def test_a_plan_survives_json_exactly(
    distances: np.ndarray, names: list[str], last_layer: str
) -> None:
    plan = every(rules=names, last_layer=last_layer).plan(distances)
    stored = json.loads(json.dumps({"more": 1, **plan.to_json()}))
    again = GroupPlan.from_json(stored)
    assert again == plan
    assert again.members == plan.members
    assert (again.hash, again.slots) == (plan.hash, plan.slots)


@pytest.mark.parametrize("edit", ["others", "smaller"])
def test_a_stored_plan_whose_other_partitions_were_edited_is_refused(edit: str) -> None:
    stored = every(smaller=[2]).plan(LINE).to_json()
    if edit == "others":
        stored["others"][1]["groups"] = [[0], [1, 2, 3, 4]]
    else:
        stored["smaller"] = [3]
    with pytest.raises(UserError, match="changed by hand"):
        GroupPlan.from_json(stored)
    del stored[edit]
    with pytest.raises(UserError, match=f"lack '{edit}'"):
        GroupPlan.from_json(stored)


def test_the_hash_of_an_ordinary_plan_is_what_it_was_before_there_were_others() -> None:
    plan = ByAmad(theta=0.2, rule="complete", last_layer="own").plan(LINE)
    assert plan.saes == [[0, 1, 2], [3, 4], [5]]
    text = '["own", [[0, 1, 2], [3, 4], [5]]]'
    assert plan.hash == hashlib.sha256(text.encode()).hexdigest()
    assert plan.members == [
        ("layers.0-2", [0, 1, 2], 1.0),
        ("layers.3-4", [3, 4], 1.0),
        ("layers.5", [5], 1.0),
    ]
    assert (plan.others, plan.smaller) == ((), ())


def test_plans_that_train_other_saes_have_other_hashes() -> None:
    plans = [
        every(**changes).plan(LINE)
        for changes in (
            {},
            {"smaller": []},
            {"smaller": [1]},
            {"rules": ["complete", "even"]},
            {"last_layer": "skip"},
        )
    ]
    assert len({plan.hash for plan in plans}) == len(plans)
    # which rule comes from where is no matter: only what is trained
    assert every(smaller=[2]).plan(LINE).hash == every(smaller="chosen").plan(LINE).hash


def test_smaller_saes_match_the_chosen_number_of_groups() -> None:
    assert every().plan(LINE).smaller == (2,)
    assert every(smaller=[]).plan(LINE).smaller == ()
    assert every(smaller=[3, 1, 3]).plan(LINE).smaller == (1, 3)
    names = [m.name for m in every(smaller=[2]).plan(LINE).members if m.width < 1]
    assert names == [f"layers.{layer}.smaller-2" for layer in range(5)]


def test_there_are_no_smaller_saes_where_amad_chooses_one_sae_per_layer() -> None:
    plan = every(theta=1e-6).plan(LINE)
    assert plan.partition.num_groups == 5
    assert plan.smaller == ()


def test_a_model_of_two_layers_has_one_grouping_of_the_first() -> None:
    plan = every().plan(LINE[:2, :2])
    assert [member.name for member in plan.members] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "all-complete"),
        ({"rules": ["complete", "minmax"]}, "all-complete-minmax"),
        ({"last_layer": "skip"}, "all-complete-last-skip"),
    ],
)
def test_the_label_names_the_rules(changes: dict[str, Any], label: str) -> None:
    assert every(**changes).label == label
    assert re.fullmatch(r"[\w.-]+", label)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rules": []}, r"groups.rules is \[\]: give a list"),
        ({"rules": "complete"}, "groups.rules is 'complete': give a list"),
        ({"rules": ["even", "even"]}, "names a rule twice"),
        ({"rules": ["even", "minmaks"]}, "rule is 'minmaks': use complete, minmax"),
        ({"theta": 0.0}, "theta is 0.0"),
        ({"theta": 2.0}, "theta is 2.0"),
        ({"smaller": "all"}, "groups.smaller is 'all': use chosen, or a list"),
        ({"smaller": [2, 0]}, "groups.smaller holds 0"),
        ({"smaller": [-1]}, "groups.smaller holds -1"),
        ({"last_layer": "none"}, "last_layer is 'none'"),
    ],
)
def test_bad_values_are_refused_at_construction(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        every(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("counts", [2, None, "2", 2.5, {"a": 1}])
def test_what_is_no_list_of_numbers_of_groups_is_refused(counts: object) -> None:
    with pytest.raises(UserError, match="use chosen, or a list of numbers"):
        check_smaller(counts)


@pytest.mark.parametrize("count", [1.5, "2", None, [2]])
def test_what_is_no_number_of_groups_is_refused(count: object) -> None:
    with pytest.raises(UserError, match="use integers from 1 up"):
        check_smaller([count])


@pytest.mark.parametrize(("last_layer", "most"), [("own", 4), ("skip", 4), ("group", 5)])
def test_as_many_smaller_saes_as_layers_are_refused_before_any_work(
    last_layer: str, most: int
) -> None:
    every(smaller=[most], last_layer=last_layer).check(6)
    sentence = (
        f"groups.smaller holds {most + 1}: .* to {most}, below the {most + 1} grouped layers"
    )
    with pytest.raises(UserError, match=sentence):
        every(smaller=[most + 1], last_layer=last_layer).check(6)
    with pytest.raises(UserError, match=sentence):
        every(smaller=[1, most + 1], last_layer=last_layer).plan(LINE)
