"""Which process owns which SAE."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.training.parallel.placement import Cost, place

fast = settings(max_examples=60, deadline=None, database=None, derandomize=True)
costs = st.lists(
    st.builds(Cost, st.integers(1, 100), st.integers(1, 100), st.integers(0, 5)), max_size=12
)


def work(costs: list[Cost], mine: list[int]) -> float:
    flops, memory = sum(c.flops for c in costs), sum(c.memory for c in costs)
    return sum(costs[i].flops / flops + costs[i].memory / memory for i in mine)


@fast
@given(costs, st.integers(1, 6))
def test_every_sae_has_one_owner_and_no_owner_is_overworked(
    costs: list[Cost], processes: int
) -> None:
    owned = place(costs, processes)
    assert len(owned) == processes
    assert sorted(i for mine in owned for i in mine) == list(range(len(costs)))
    assert all(mine == sorted(mine) for mine in owned)
    assert owned == place(costs, processes)
    if costs:
        # Graham's bound, against what no placement can be better than
        most = max(work(costs, mine) for mine in owned)
        least = max(2 / processes, max(work(costs, [i]) for i in range(len(costs))))
        assert most <= (2 - 1 / processes) * least + 1e-6


def test_the_most_expensive_come_first() -> None:
    sizes = [1, 5, 2, 4, 3, 3]
    assert place([Cost(s, s, i) for i, s in enumerate(sizes)], 2) == [[0, 1, 5], [2, 3, 4]]


def test_flops_and_memory_count_alike() -> None:
    computes, holds = Cost(10, 0, 0), Cost(0, 10, 1)
    # by FLOPs alone, or by memory alone, three of them would weigh nothing
    assert place([computes, holds, Cost(0, 0, 2)], 2)[1] == [1]
    assert [len(mine) for mine in place([computes, holds, computes, holds], 2)] == [2, 2]


@pytest.mark.parametrize("processes", [2, 3])
def test_saes_on_the_same_rows_are_together_where_it_costs_nothing(processes: int) -> None:
    slots = [0, 1, 1, 0] if processes == 2 else [0, 1, 2, 2, 1, 0]
    owned = place([Cost(1, 1, slot) for slot in slots], processes)
    assert [{slots[i] for i in mine} for mine in owned] == [{s} for s in range(processes)]


def test_more_processes_than_saes_leave_some_without() -> None:
    assert place([Cost(1, 1, 0), Cost(2, 2, 1)], 4) == [[1], [0], [], []]
