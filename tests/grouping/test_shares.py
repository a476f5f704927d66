"""Shares of the mean and of one dimension: planted, and what a user is advised to do."""

import shlex

import numpy as np
import pytest
import torch
from torch import Tensor

from groupsae.grouping.moments import LayerMoments
from groupsae.grouping.shares import Shares, advice, mean_dominates
from tests.helpers.runs import composed

D, TOKENS = 16, 4000


def shares_of(*layers: Tensor) -> Shares:
    moments = LayerMoments(num_layers=len(layers), d_model=D)
    for part in torch.stack(layers).split(1500, dim=1):
        moments.update(part)
    return moments.moments().shares()


def noise(seed: int) -> Tensor:
    """Return tokens of mean zero, exactly, and of one norm."""
    half = torch.randn(TOKENS // 2, D, generator=torch.Generator().manual_seed(seed)).double()
    half = half / half.norm(dim=1, keepdim=True)
    return torch.cat([half, -half])


def planted(share: float, seed: int = 0) -> Tensor:
    """Return tokens with this share of the mean in the squared norm, all of it in dimension 5."""
    mean = torch.zeros(D, dtype=torch.float64)
    mean[5] = (share / (1 - share)) ** 0.5
    return noise(seed) + mean


def test_planted_shares_are_found() -> None:
    x = noise(1)
    x[:, 3] *= 10
    found = shares_of(planted(0.8), planted(0.25), noise(0), x)
    np.testing.assert_allclose(found.mean_share, [0.8, 0.25, 0, 0], atol=1e-12)
    squares = torch.stack([planted(0.8), planted(0.25), noise(0), x]).square().mean(dim=1)
    largest, dimension = squares.max(dim=1)
    np.testing.assert_allclose(found.dimension_share, largest / squares.sum(dim=1), rtol=1e-12)
    assert found.dimension.tolist() == dimension.tolist()
    assert found.dimension[[0, 1, 3]].tolist() == [5, 5, 3]
    # the norms are nearly equal, so two tokens have the mean's share as their cosine
    assert found.token_cosine == pytest.approx(found.mean_share, abs=0.02)
    assert found.evenness[2] == pytest.approx(1)


def test_the_cosine_of_tokens_is_the_mean_over_all_pairs() -> None:
    x = planted(0.6) * torch.rand(TOKENS, 1, generator=torch.Generator().manual_seed(2))
    unit = x / x.norm(dim=1, keepdim=True)
    assert shares_of(x).token_cosine[0] == pytest.approx(float((unit @ unit.T).mean()), rel=1e-9)


def sunk(share: float) -> Tensor:
    """Return tokens of which one in a hundred is a sink of fifty times the norm."""
    x = planted(share)
    x[::100] = 0
    x[::100, 2] = 50 * planted(share).norm(dim=1).mean()
    return x


def test_sinks_hide_the_mean_from_its_share_but_not_from_the_cosine() -> None:
    found = shares_of(sunk(0.8))
    assert found.mean_share[0] < 0.3 < 0.7 < found.token_cosine[0]
    assert found.evenness[0] < 0.2
    assert found.dimension[0] == 2


UNCENTRED, CENTRED = [[0, 1, 2]], [[0], [1, 2]]
GIVEN = ["model=tiny", "output='my runs (1)'", "calibration.tokens=5", "calibration.centring=none"]


def advised(
    *layers: Tensor, centring: str = "none", filtered: bool = False, **kwargs
) -> str | None:
    given = {"groups": (UNCENTRED, CENTRED), "overrides": GIVEN} | kwargs
    return advice(shares_of(*layers), centring=centring, filtered=filtered, **given)


def command(text: str) -> list[str]:
    """Return the arguments of the command in an advice."""
    *_, line = text.splitlines()
    start, *arguments = line.strip().split("python -m groupsae.train ")
    assert not start
    return shlex.split(arguments[0])


def test_a_mean_that_dominates_is_named_with_both_numbers_of_groups_and_a_command() -> None:
    text = advised(planted(0.74), planted(0.93), planted(0.24))
    assert text is not None
    assert "the mean has 24 to 93 % of a layer's squared norm, the largest dimension" in text
    assert "(number 5 at 3 of 3 layers)" in text
    assert "Uncentred distances give 1 group, centred ones 2." in text
    assert command(text) == [*GIVEN[:3], "calibration.centring=mean"]
    cfg = composed(command(text))
    assert (cfg.calibration.centring, cfg.output) == ("mean", "my runs (1)")


def test_centring_is_chosen_where_the_mean_dominates_at_most_layers() -> None:
    for layers, chosen in (
        ([planted(0.74), planted(0.93), planted(0.24)], True),
        ([planted(0.74), planted(0.2), planted(0.24)], False),
        ([sunk(0.8), sunk(0.8)], True),  # hidden from its share, seen in the cosine
    ):
        shares = shares_of(*layers)
        assert mean_dominates(shares) is chosen


def test_sinks_are_named_with_a_command() -> None:
    text = advised(sunk(0.1), sunk(0.1))
    assert text is not None
    assert text.startswith("A few tokens of extreme norm")
    assert "mean activations" not in text
    assert composed(command(text)).stream.max_norm_ratio == 10
    assert advised(sunk(0.1), sunk(0.1), filtered=True) is None


def test_sinks_and_a_mean_take_one_command() -> None:
    text = advised(sunk(0.8), sunk(0.8))
    assert text is not None
    cfg = composed(command(text))
    assert (cfg.calibration.centring, cfg.stream.max_norm_ratio) == ("mean", 10)


def test_a_dimension_that_varies_from_token_to_token_is_named() -> None:
    x = noise(0)
    x[:, 3] = 3 * x[:, 3].sign() + 2
    text = advised(x, x)
    assert text is not None
    assert "calibration.centring=mean" in text


@pytest.mark.parametrize(
    "quiet",
    [
        {"groups": (UNCENTRED, UNCENTRED)},
        {"groups": None},
        {"centring": "mean"},
    ],
)
def test_nothing_is_advised_that_would_change_nothing(quiet: dict) -> None:
    assert advised(planted(0.9), planted(0.9), **quiet) is None


def test_ordinary_models_are_left_in_peace() -> None:
    assert advised(planted(0.24), planted(0.3), noise(0)) is None
    assert advised(planted(0.9), *map(noise, range(3))) is None  # one layer of four
