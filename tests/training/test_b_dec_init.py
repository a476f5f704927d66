"""Where training starts and how it is scheduled: bias, learning rate, scale of the activations."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from groupsae.grouping.choices import PerLayer
from groupsae.grouping.moments import LayerMoments
from groupsae.runtime.errors import UserError
from groupsae.sae.base import no_reduce
from groupsae.training.b_dec_init import init_b_dec
from groupsae.training.callbacks.grouping import GroupLayers
from groupsae.training.measure import Measurement
from groupsae.training.optim import Adam
from tests.helpers.saes import make


def rows_with_outliers() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator) + torch.arange(6)
    x[:10] += 500
    return x


def initial(start: str, x: Tensor, all_sum: Callable[[Tensor], Tensor] = no_reduce) -> Tensor:
    sae = make("topk")
    init_b_dec(sae, x, start, all_sum, {0: x.mean(0)})
    return sae.b_dec.detach()


def test_the_bias_starts_at_zero_at_the_mean_or_at_the_geometric_median() -> None:
    x = rows_with_outliers()
    assert not initial("zero", x).any()
    torch.testing.assert_close(initial("mean", x), x.mean(0))
    points = x.double().numpy()
    best = minimize(lambda c: np.linalg.norm(points - c, axis=1).sum(), points.mean(0)).x
    median = initial("geometric_median", x)
    torch.testing.assert_close(median.double(), torch.from_numpy(best), rtol=1e-3, atol=1e-3)
    assert (median - torch.arange(6)).norm() < 1 < (x.mean(0) - torch.arange(6)).norm()


def test_two_processes_start_where_one_does() -> None:
    """Two threads in step, with unequal parts, that know of each other by the sums only."""
    x = rows_with_outliers()
    barrier, given = Barrier(2), [torch.empty(0)] * 2

    def part(number: int, rows: Tensor) -> Tensor:
        def all_sum(value: Tensor) -> Tensor:
            barrier.wait(30)
            given[number] = value
            barrier.wait(30)
            return given[0] + given[1]

        return initial("geometric_median", rows, all_sum)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(part, (0, 1), (x[:30], x[30:])))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], initial("geometric_median", x))


def test_a_batch_without_rows_leaves_the_bias_at_zero() -> None:
    assert not initial("geometric_median", torch.empty(0, 6)).any()


def test_an_unknown_start_or_scale_is_refused() -> None:
    with pytest.raises(UserError, match="b_dec_start is 'median': use zero, mean, geometric_m"):
        initial("median", torch.ones(2, 6))
    with pytest.raises(UserError, match="calibration.scale is 'l2': use rms, mean_norm"):
        GroupLayers(
            choice=PerLayer(), folder="", cache="", tokens=1, centring="none", show=print,
            scale="l2",
        )  # fmt: skip


def adam(**changes: object) -> Adam:
    return Adam(**{"base_lr": 1e-3, "base_d_sae": 32, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup": 0.5}, [0.5, 1, 1, 1]),
        ({"warmup": 1.0}, [0.25, 0.5, 0.75, 1]),
        ({"decay": "linear", "decay_share": 0.5}, [1, 1, 1, 0.5]),
        ({"decay": "linear", "decay_share": 1.0}, [1, 0.75, 0.5, 0.25]),
        ({"decay": "cosine", "decay_share": 1.0}, [1, None, 0.5, None]),
        ({"warmup": 0.5, "decay": "linear", "decay_share": 0.5}, [0.5, 1, 1, 0.5]),
        ({"decay": "linear", "decay_share": 0.0}, [1, 1, 1, 1]),
    ],
)
def test_the_rate_rises_and_falls(changes: dict[str, object], expected: list[float]) -> None:
    found = [adam(**changes).factor(step, 4) for step in range(4)]
    for mine, its in zip(found, expected, strict=True):
        assert its is None or mine == pytest.approx(its)


def test_cosine_decay_is_half_a_cosine() -> None:
    optim = adam(decay="cosine", decay_share=0.5)
    for step in (50, 60, 75, 90):
        expected = (1 + math.cos(math.pi * (step - 50) / 50)) / 2
        assert optim.factor(step, 100) == pytest.approx(expected)


def test_the_schedule_keeps_what_each_width_has_of_its_own() -> None:
    optim = adam(decay="linear", decay_share=1.0)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [w], "lr": optim.lr(n)} for w, n in zip(weights, (32, 128), strict=True)]
    optimizer = optim.build(groups)
    for step in (2, 1):  # each from the full rate, not from the last one
        optim.schedule(optimizer, step, 4)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([7.5e-4, 3.75e-4])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decay": "step"}, "optim.decay is 'step': use constant, linear, cosine"),
        ({"warmup": 2}, "optim.warmup is 2"),
        ({"decay_share": -0.1}, "optim.decay_share is -0.1"),
    ],
)
def test_an_impossible_schedule_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        adam(**changes)


def test_scale_rules_do_what_they_say() -> None:
    acts = torch.randn(2, 50, 9, generator=torch.Generator().manual_seed(3)) * torch.tensor(
        [[[4.0]], [[0.5]]]
    )
    moments = LayerMoments(num_layers=2, d_model=9)
    moments.update(acts)
    found, square = moments.moments(), np.zeros((2, 2))
    norms = (each.numpy() for each in found[1:3])
    measured = Measurement(square, *norms, 9, {}, 0.0, found.shares(), square, found.mean.numpy())

    def scaled(scale: str, layer: int) -> Tensor:
        return (acts[layer].double() * measured.norm_factors(scale)[layer]).norm(dim=1)

    for layer in range(2):
        assert scaled("rms", layer).square().mean() == pytest.approx(1)
        assert scaled("mean_norm", layer).mean() == pytest.approx(1)
        assert scaled("sqrt_d", layer).mean() == pytest.approx(3)
        assert torch.equal(scaled("none", layer), acts[layer].double().norm(dim=1))
