"""Groups whose layers differ by a rotation or by a shift, and where the biases of layers start."""

from typing import Any

import pytest
import torch

from groupsae.data.batch import ActivationBatch
from groupsae.runtime.errors import UserError
from groupsae.sae.base import no_reduce
from groupsae.sae.topk import TopK
from groupsae.training.b_dec_init import init_b_dec
from groupsae.training.group import GroupSAE, JointStep
from tests.helpers.fits import make_optim
from tests.helpers.saes import generator, make

D, K, LAYERS, STEPS, ROWS = 16, 2, [2, 5], 400, 128


def planted(shifted: bool, rows: int, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of two layers in turn, of K of D orthogonal latents; the second is moved."""
    directions = torch.linalg.qr(torch.randn(D, D, generator=generator(1)))[0]
    picked = torch.rand(rows, D, generator=draws).topk(K, dim=1).indices
    weights = 0.5 + torch.rand(rows, K, generator=draws)
    x = (weights.unsqueeze(2) * directions[picked]).sum(1)
    layers = torch.tensor(LAYERS).repeat(rows)[:rows]
    one, other = torch.linalg.qr(torch.randn(D, 4, generator=generator(2)))[0].split(2, dim=1)
    turn = (
        one @ other.T - other @ one.T - one @ one.T - other @ other.T
    )  # a quarter, in two planes
    moved = x + 2 * one[:, 0] if shifted else x + x @ turn
    return torch.where((layers == LAYERS[1]).unsqueeze(1), moved, x), layers


def fvu(shifted: bool, **own: Any) -> float:
    """Return the larger of the layers' FVUs after a training, on rows never trained on."""
    draws = generator(3)
    x, layers = planted(shifted, 2000, draws)
    group = GroupSAE(
        name="layers.2-5", layers=LAYERS, norm_factors=dict.fromkeys(LAYERS, 1.0), d_model=D,
        sae=lambda **given: TopK(d_sae=D, k=K, **own, **given), optim=make_optim(base_lr=1e-2),
        dead_after=5000, b_dec_start="mean", nonfinite="stop", seed=0,
        means={layer: x[layers == layer].mean(0) for layer in LAYERS},
    )  # fmt: skip
    joint = JointStep([group], group.optim, "stop")
    for step in range(STEPS):
        rows = planted(shifted, ROWS, draws)
        joint.optimizer.zero_grad()
        batch = ActivationBatch([LAYERS], rows[0][None], rows[1][None], None)
        joint.loss(batch, step, STEPS).backward()
        joint.optimizer.step()
    x, layers = planted(shifted, 2000, generator(9))
    found = []
    for layer in LAYERS:
        mine = x[layers == layer]
        error = mine - group.reconstruct(mine, layer)[0]
        found.append(float(error.square().sum() / (mine - mine.mean(0)).square().sum()))
    return max(found)


@pytest.mark.parametrize(
    ("shifted", "own"), [(False, {"layer_rank": 4}), (True, {"layer_bias": "per_layer"})]
)
def test_it_learns_layers_that_differ_by_a_rotation_or_a_shift(shifted: bool, own: Any) -> None:
    assert fvu(shifted, **own) < 0.6 * fvu(shifted)


# ---- where biases start ---------------------------------------------------------------------

MEANS = {2: torch.arange(6.0), 5: torch.ones(6)}


def started(start: str, **own: Any) -> Any:
    sae = make("topk", **own)
    init_b_dec(sae, torch.randn(50, 6, generator=generator()), start, no_reduce, MEANS)
    return sae


def test_a_shared_bias_starts_at_the_mean_of_the_layers_means() -> None:
    expected = (torch.arange(6.0) + 1) / 2
    assert torch.equal(started("mean").b_dec, expected)
    assert torch.equal(started("mean", layer_rank=2, layers=LAYERS).b_dec, expected)
    assert not started("zero", layer_rank=2, layers=LAYERS).b_dec.any()


@pytest.mark.parametrize("start", ["zero", "mean", "geometric_median"])
def test_biases_of_layers_start_at_their_means(start: str) -> None:
    sae = started(start, layer_bias="per_layer", layers=LAYERS)
    for layer, mean in MEANS.items():
        torch.testing.assert_close(sae.at(layer).b_dec, mean)
    alone = make("topk", layer_bias="per_layer", layers=[5])
    init_b_dec(alone, torch.empty(0, 6), "zero", no_reduce, {5: MEANS[5]})
    assert torch.equal(alone.b_dec, MEANS[5])


def test_without_means_they_are_refused() -> None:
    for start, own in (("mean", {}), ("zero", {"layer_bias": "per_layer"})):
        with pytest.raises(UserError, match="biases of single layers start at the layers"):
            init_b_dec(make("topk", **own), torch.ones(2, 6), start, no_reduce, {})
