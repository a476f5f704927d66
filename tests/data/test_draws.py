"""The draw of layers is a pure function of (seed, group, position), and it is uniform."""

import hashlib
from functools import partial
from itertools import combinations

import pytest
import torch
from scipy import stats

from groupsae.data.draws import draw_layers, stream_key


def reference_draws(positions, layers, seed):
    """SplitMix64 as published (Steele, Lea, Flood 2014), on Python's unbounded integers."""
    wrap = (1 << 64) - 1
    start = int.from_bytes(hashlib.sha256(f"{seed}:{layers}".encode()).digest()[:8], "big")
    drawn = []
    for position in positions:
        z = (start + position * 0x9E3779B97F4A7C15) & wrap
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        z ^= z >> 31
        drawn.append(layers[(z >> 33) % len(layers)])
    return drawn


@pytest.mark.parametrize("layers", [[0, 1], [3, 4, 5], [2, 5, 7, 11, 13], list(range(24))])
@pytest.mark.parametrize("seed", [0, 1, 123_456_789])
def test_draws_equal_splitmix64_in_plain_python(layers, seed):
    positions = [*range(200), 10**9 + 7, 2**40, 2**62 + 3, 2**63 - 1]
    (drawn,) = draw_layers(torch.tensor(positions), layers, seed)
    assert drawn.tolist() == reference_draws(positions, layers, seed)


def test_splitmix64_of_the_reference_gives_the_published_first_values():
    # The output for state 0 after one increment, as in the authors' C code: 0xE220A8397B1DCDAF.
    z = 0x9E3779B97F4A7C15
    wrap = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
    assert z ^ (z >> 31) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("size", [2, 3, 7, 12])
def test_draws_are_uniform_over_the_group(size):
    layers = list(range(4, 4 + size))
    (drawn,) = draw_layers(torch.arange(120_000), layers, seed=5)
    counts = torch.bincount(drawn - 4, minlength=size)
    assert len(counts) == size
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_neighbouring_positions_draw_independently():
    (drawn,) = draw_layers(torch.arange(120_001), [0, 1, 2], seed=9)
    pairs = torch.bincount(3 * drawn[:-1] + drawn[1:], minlength=9).reshape(3, 3)
    assert stats.chi2_contingency(pairs.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 3])
def test_a_draw_does_not_depend_on_how_positions_are_split_or_ordered(count):
    draws = partial(draw_layers, layers=[1, 2, 3, 4], seed=0, count=count)
    whole, parts = draws(torch.arange(1000)), map(draws, torch.arange(1000).split(37))
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat(list(parts), 1), whole)
    assert torch.equal(draws(order), whole[:, order])
    assert torch.equal(draws(torch.arange(1000)), whole)


def test_global_randomness_plays_no_part():
    first = draw_layers(torch.arange(100), [0, 1], seed=0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(draw_layers(torch.arange(100), [0, 1], seed=0), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_and_seeds_draw_unlike_each_other():
    positions = torch.arange(30_000)
    (base,) = draw_layers(positions, [0, 1, 2], seed=0)
    (second,) = draw_layers(positions, [3, 4, 5], seed=0)
    others = [second - 3, *draw_layers(positions, [0, 1, 2], 1)]
    for other in others:
        table = torch.bincount(3 * base + other, minlength=9).reshape(3, 3)
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3
    assert stream_key(0, [0, 1, 2]) != stream_key(0, [0, 1]) != stream_key(1, [0, 1])


def test_a_group_of_one_draws_its_only_layer():
    assert draw_layers(torch.arange(5), [7], seed=0).tolist() == [[7] * 5]


@pytest.mark.parametrize(("size", "count"), [(4, 2), (5, 3), (8, 4), (7, 6)])
def test_several_layers_are_different_and_every_set_of_them_is_as_likely(size, count):
    layers = list(range(2, 2 + size))
    drawn = draw_layers(torch.arange(120_000), layers, seed=5, count=count).sort(0).values
    assert (drawn.diff(dim=0) > 0).all()
    sets = list(combinations(layers, count))
    powers = torch.tensor([100**i for i in range(count)]).unsqueeze(1)
    names, counts = (drawn * powers).sum(0).unique(return_counts=True)
    assert set(names.tolist()) == {sum(x * 100**i for i, x in enumerate(s)) for s in sets}
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_as_many_rows_as_layers_show_every_layer():
    drawn = draw_layers(torch.arange(9), [1, 4, 6], seed=0, count=3)
    assert drawn.sort(0).values.tolist() == [[1] * 9, [4] * 9, [6] * 9]


def test_neighbouring_positions_draw_their_second_layers_independently():
    drawn = draw_layers(torch.arange(120_001), [0, 1, 2, 3], seed=9, count=2)
    pairs = 4 * drawn.min(0).values + drawn.max(0).values  # of 6 sets
    ranks = pairs.unique(return_inverse=True)[1]
    table = torch.bincount(6 * ranks[:-1] + ranks[1:], minlength=36).reshape(6, 6)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3
