"""Reconstruction: FVU and L0 from running sums equal those of all data at once."""

import numpy as np
import pytest
import torch

from groupsae.sae.base import SparseLatents
from groupsae.sae.metrics import Reconstruction


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def sample(generator, rows, d_model=6, d_sae=40, k=5):
    """Return activations, reconstructions and latents, some of them zero."""
    x = torch.randn(rows, d_model, generator=generator) * 3 + 10
    x_hat = x + 0.3 * torch.randn(rows, d_model, generator=generator)
    scores = torch.randn(rows, d_sae, generator=generator)
    values, indices = scores.topk(k)
    return x, x_hat, SparseLatents((values - 1.2).relu(), indices)


def metric_of(*batches, d_model=6, d_sae=40):
    metric = Reconstruction(d_model=d_model, d_sae=d_sae)
    for batch in batches:
        metric.update(*batch)
    return metric


def cut(batch, start, stop):
    x, x_hat, latents = batch
    return x[start:stop], x_hat[start:stop], SparseLatents(*(t[start:stop] for t in latents[:2]))


def test_batches_of_any_size_equal_numpy_over_the_complete_set(generator):
    batch = sample(generator, 500)
    x, x_hat, latents = batch
    x64, x_hat64 = x.numpy().astype(np.float64), x_hat.numpy().astype(np.float64)
    fvu = ((x64 - x_hat64) ** 2).sum() / ((x64 - x64.mean(0)) ** 2).sum()
    fired = {int(i) for row, values in zip(latents.indices, latents.acts, strict=True)
             for i, value in zip(row, values, strict=True) if value > 0}  # fmt: skip
    result = metric_of(*(cut(batch, a, b) for a, b in [(0, 1), (1, 130), (130, 500)])).compute()
    # inputs are float32, so the difference x - x_hat is rounded once per entry
    torch.testing.assert_close(float(result["fvu"]), fvu, rtol=1e-6, atol=0)
    assert float(result["l0"]) == float((latents.acts > 0).sum()) / 500
    assert set(result["fired"].nonzero().flatten().tolist()) == fired
    assert 0 < len(fired) <= 40
    assert int(result["fired"].sum()) == len(fired)


def test_fvu_is_the_ratio_of_sums_and_not_the_mean_of_batch_ratios(generator):
    # Two batches with different means: each batch's own variance misses what lies between them.
    low, high = sample(generator, 50), sample(generator, 50)
    high = (high[0] + 20, high[1] + 20, high[2])
    streamed = metric_of(low, high).compute()["fvu"]
    ratios = [metric_of(batch).compute()["fvu"] for batch in (low, high)]
    assert streamed < 0.2 * torch.stack(ratios).mean()


def test_fvu_of_a_perfect_reconstruction_is_zero_and_of_the_mean_is_one(generator):
    x, _, latents = sample(generator, 200)
    mean = x.double().mean(0).float().expand_as(x)
    assert float(metric_of((x, x, latents)).compute()["fvu"]) == 0.0
    # 1e-6: the mean is rounded to float32
    assert float(metric_of((x, mean, latents)).compute()["fvu"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.25, 1e4])
def test_fvu_does_not_depend_on_the_scale(generator, scale):
    x, x_hat, latents = sample(generator, 200)
    before = metric_of((x, x_hat, latents)).compute()["fvu"]
    after = metric_of((x * scale, x_hat * scale, latents)).compute()["fvu"]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


def test_a_mean_far_from_zero_costs_no_digits(generator):
    # sum |x|^2 - |sum x|^2 / n cancels: float64 must carry it where the mean is 1e3 deviations
    x = torch.randn(400, 6, generator=generator) + 1e3
    x_hat = x + 0.5
    fvu = metric_of((x, x_hat, sample(generator, 400)[2])).compute()["fvu"]
    x64 = x.double()
    expected = (x64 - x_hat.double()).square().sum() / (x64 - x64.mean(0)).square().sum()
    torch.testing.assert_close(fvu, expected, rtol=1e-6, atol=0)


def test_merged_states_of_two_halves_equal_one_state_of_all(generator):
    batch = sample(generator, 300)
    whole, first, second = (
        metric_of(cut(batch, a, b)) for a, b in [(0, 300), (0, 111), (111, 300)]
    )
    first.merge_state(second)
    merged, expected = first.compute(), whole.compute()
    for name in ("fvu", "l0", "fired"):
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-12, atol=0)


def test_reset_forgets_everything(generator):
    first, second = sample(generator, 100), sample(generator, 100)
    metric = metric_of(first)
    metric.reset()
    metric.update(*second)
    assert metric.compute()["fvu"] == metric_of(second).compute()["fvu"]


def test_latents_of_value_zero_are_neither_active_nor_fired():
    latents = SparseLatents(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0, 1], [0, 2]]))
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    result = metric_of((x, x, latents), d_model=2, d_sae=4).compute()
    assert result["fired"].tolist() == [True, False, False, False]
    assert float(result["l0"]) == 1.0
    assert float(result["fired"].float().mean()) == 0.25
