"""Densities and layer profiles: against counting by hand."""

import json

import numpy as np
import pytest

from groupsae.evaluation.latents import density_histogram, layer_profile


@pytest.mark.parametrize("tokens", [1, 3, 10, 1000, 12_345, 10**6])
def test_every_latent_lies_in_one_bin_or_never_fired(tokens):
    fired = np.random.randint(0, tokens + 1, 500)
    fired[:3] = 0, 1, tokens
    found = density_histogram(fired, tokens)
    assert len(found["edges"]) == len(found["counts"]) + 1
    assert sum(found["counts"]) + found["never"] == 500
    assert found["never"] == (fired == 0).sum()
    assert found["edges"][-1] == 0
    assert found["edges"][0] <= -np.log10(tokens) + 1e-9
    json.dumps(found)


def test_bins_are_of_the_logarithm():
    fired = np.array([0, 1, 9, 11, 99, 101, 1000])
    found = density_histogram(fired, 1000)
    assert found["edges"][::4] == [-3, -2, -1, 0]
    decades = np.array(found["counts"]).reshape(3, 4).sum(1)
    assert decades.tolist() == [2, 2, 2]
    assert found["never"] == 1


def test_no_tokens_have_no_density():
    with pytest.raises(ValueError, match="no tokens"):
        density_histogram(np.zeros(3, np.int64), 0)


def profile_of(rows, tokens=(100, 100, 100), layers=(3, 4, 5)):
    return layer_profile(np.array(rows).T.copy(), np.array(tokens), layers)


def test_summary_of_a_profile_counted_by_hand():
    # one latent of layer 3 alone, one of 4 and 5 evenly, one everywhere, one nowhere
    profile = profile_of([[7, 0, 0], [0, 9, 9], [2, 2, 2], [0, 0, 0]])
    np.testing.assert_allclose(profile.shares.sum(1), [1, 1, 1, 0])
    np.testing.assert_allclose(profile.mean_layers, [3, 4.5, 4, np.nan])
    assert profile.alive.tolist() == [True, True, True, False]
    found = profile.summary()
    assert found == {
        "layers": [3, 4, 5],
        "mean_max_share": pytest.approx((1 + 1 / 2 + 1 / 3) / 3),
        "specific": pytest.approx(1 / 3),
        "specific_to": [pytest.approx(1 / 3), 0, 0],
        "mean_effective_layers": pytest.approx((1 + 2 + 3) / 3),
        "mean_layer": pytest.approx((3 + 4.5 + 4) / 3),
        "never": 1,
    }
    json.dumps(found)


def test_rates_count_and_not_tokens():
    rows = np.random.randint(0, 20, (30, 3))
    more = rows * np.array([1, 2, 5])
    np.testing.assert_allclose(
        profile_of(more, tokens=(100, 200, 500)).shares, profile_of(rows).shares
    )


def test_one_layer_has_everything():
    found = profile_of([[4], [1]], tokens=(10,), layers=(2,)).summary()
    values = [found["mean_max_share"], found["specific"], found["mean_effective_layers"]]
    assert values == [1, 1, 1]
    assert found["mean_layer"] == 2


def test_a_group_that_never_fired_has_no_summary_but_its_count():
    found = profile_of([[0, 0, 0]] * 4).summary()
    assert found.pop("never") == 4
    assert found.pop("layers") == [3, 4, 5]
    assert set(found.values()) == {None}


def test_layers_without_tokens_are_named():
    with pytest.raises(ValueError, match=r"\[4\]"):
        profile_of([[1, 0, 1]], tokens=(10, 0, 10))
