"""Reconstruction metrics and their bootstrap equal plain float64 formulas over all tokens."""

import json

import numpy as np
import pytest
import torch

from groupsae.evaluation.intervals import Bootstrap
from groupsae.evaluation.reconstruction import (
    LayerSums,
    ReconstructionSums,
    SequenceSums,
    layer_metrics,
)
from groupsae.sae.base import SparseLatents

D_MODEL, D_SAE, K, POS = 6, 40, 5, 7


def test_sums_follow_the_order_of_the_sequences():
    sums = SequenceSums()
    assert sums["ce"].shape == (0,)
    for start in (0, 2, 3):
        numbers = torch.arange(start, start + 2)
        sums.append(ce=numbers, rows=-numbers[:, None].expand(2, 3))
    assert sums["ce"].tolist() == [0, 1, 2, 3, 3, 4]
    assert sums["rows"].tolist() == [[-n] * 3 for n in (0, 1, 2, 3, 3, 4)]
    assert sums["ce"].dtype == sums["rows"].dtype == np.float64


@pytest.fixture
def batch():
    return sample(9)


def sample(blocks, offset=10.0):
    """Return x, x_hat and latents, some of them zero; one latent is dense, one dead."""
    x = torch.randn(blocks, POS, D_MODEL) * 3 + offset
    x_hat = 0.9 * x + 0.3 * torch.randn_like(x) + 0.1
    scores = torch.randn(blocks * POS, D_SAE)
    scores[:, 3], scores[:, 4] = 3, -3
    values, indices = scores.topk(K)
    return x, x_hat, SparseLatents((values - 1.2).relu(), indices)


def some_kept(blocks):
    keep = torch.rand(blocks, POS) > 0.3
    keep[0], keep[1], keep[5] = True, False, True
    return keep


def sums_of(batch, keep=None, cuts=()):
    x, x_hat, latents = batch
    layer, sums = LayerSums(D_MODEL), ReconstructionSums(D_MODEL, D_SAE)
    edges = [0, *cuts, len(x)]
    for start, stop in zip(edges, edges[1:], strict=False):
        rows = SparseLatents(*(t[start * POS : stop * POS] for t in latents[:2]))
        kept = None if keep is None else keep[start:stop]
        layer.update(x[start:stop], kept)
        sums.update(x[start:stop], x_hat[start:stop], rows, kept)
    return layer, sums


def metrics_of(*args, **kwargs):
    return layer_metrics(*sums_of(*args, **kwargs))


def reference(batch, keep):
    """Return the metrics by their definitions, in float64, of all data as one batch."""
    x, y = (t[keep].double().numpy() for t in batch[:2])
    acts = torch.zeros(keep.numel(), D_SAE).scatter(1, batch[2].indices, batch[2].acts)
    on = (acts.numpy() > 0)[keep.flatten().numpy()]
    error, norm = x - y, np.linalg.norm
    total = ((x - x.mean(0)) ** 2).sum()
    mse = (error**2).sum(1).mean()
    ratios = (error**2).sum(1) / ((x - x.mean(0)) ** 2).sum(1)
    wrong = (x**2).sum(1).mean() - (x**2).mean() ** 2
    rest = np.delete(np.arange(D_MODEL), x.var(0).argmax())
    return {
        "fvu": (error**2).sum() / total,
        "fvu_rest": (error[:, rest] ** 2).sum() / (x.var(0)[rest].sum() * len(x)),
        "explained_variance_legacy": (1 - ratios).mean(),
        "explained_variance_dictionary_learning": 1 - error.var(0).sum() / x.var(0).sum(),
        "explained_variance_saebench": 1 - mse / wrong,
        "mse": mse,
        "cosine": ((x * y).sum(1) / norm(x, axis=1) / norm(y, axis=1)).mean(),
        "norm_ratio": (norm(y, axis=1) / norm(x, axis=1)).mean(),
        "relative_bias": (y**2).sum(1).mean() / (x * y).sum(1).mean(),
        "l0": on.sum(1).mean(),
        "dead": (on.sum(0) == 0).mean(),
        "dense": (on.mean(0) > 0.1).mean(),
    }


def close(found, expected, rel=1e-6):
    assert found == pytest.approx(expected, rel=rel, abs=1e-12)
    assert list(found) == list(expected)


def test_metrics_equal_float64_formulas(batch):
    expected = reference(batch, torch.ones(9, POS, dtype=torch.bool))
    close(metrics_of(batch), expected)
    assert 0 < expected["dead"] < 1
    assert 0 < expected["dense"] < 1


def test_an_fvu_that_one_dimension_makes_good_is_seen():
    x, x_hat, latents = sample(9)
    x[..., 2] *= 1000  # nearly all of the variance
    x_hat = torch.where(torch.arange(D_MODEL) == 2, x, x.mean((0, 1)))
    layer, sums = sums_of((x, x_hat, latents))
    found = layer_metrics(layer, sums)
    assert found["fvu"] < 1e-3
    assert found["fvu_rest"] == pytest.approx(1, rel=1e-4)
    assert layer.largest.tolist() == [2]
    assert layer.largest_share > 0.999


def test_left_out_positions_count_nowhere_whatever_they_hold(batch):
    keep = some_kept(9)
    expected = reference(batch, keep)
    batch[0][~keep], batch[1][~keep] = float("nan"), float("inf")
    close(metrics_of(batch, keep), expected)


def test_keeping_all_is_the_same_as_no_mask(batch):
    assert metrics_of(batch) == metrics_of(batch, torch.ones(9, POS, dtype=torch.bool))


@pytest.mark.parametrize("cuts", [(1,), (4,), (1, 2, 8)])
def test_only_the_legacy_variance_depends_on_the_batches(batch, cuts):
    keep = some_kept(9)
    whole, parts = metrics_of(batch, keep), metrics_of(batch, keep, cuts)
    assert whole.pop("explained_variance_legacy") != parts.pop("explained_variance_legacy")
    close(parts, whole)


def test_legacy_is_the_mean_over_tokens_with_each_batchs_own_mean(batch):
    first, second = [tuple(t[a:b] for t in batch[:2]) for a, b in [(0, 3), (3, 9)]]
    shares = []
    for x, y in (first, second):
        x, y = x.reshape(-1, D_MODEL).double(), y.reshape(-1, D_MODEL).double()
        shares.append(1 - (x - y).square().sum(1) / (x - x.mean(0)).square().sum(1))
    found = metrics_of(batch, cuts=(3,))["explained_variance_legacy"]
    assert found == pytest.approx(float(torch.cat(shares).mean()), rel=1e-6)


def test_order_of_sequences_does_not_matter(batch):
    order = torch.randperm(9)
    rows = (order[:, None] * POS + torch.arange(POS)).flatten()
    shuffled = (batch[0][order], batch[1][order], SparseLatents(*(t[rows] for t in batch[2][:2])))
    close(metrics_of(shuffled), metrics_of(batch))


def test_perfect_reconstruction(batch):
    found = metrics_of((batch[0], batch[0].clone(), batch[2]))
    assert found["fvu"] == found["mse"] == 0
    for name in ("legacy", "dictionary_learning", "saebench"):
        assert found[f"explained_variance_{name}"] == 1
    assert found["norm_ratio"] == pytest.approx(1)
    assert found["cosine"] == pytest.approx(1)
    assert found["relative_bias"] == pytest.approx(1)


def test_the_mean_as_reconstruction_has_an_fvu_of_one(batch):
    mean = batch[0].mean((0, 1)).expand_as(batch[0])
    found = metrics_of((batch[0], mean, batch[2]))
    assert found["fvu"] == pytest.approx(1, rel=1e-6)
    assert found["explained_variance_dictionary_learning"] == pytest.approx(0, abs=1e-6)


def test_a_constant_error_is_forgiven_by_one_variant_only(batch):
    found = metrics_of((batch[0], batch[0] + 2, batch[2]))
    assert found["explained_variance_dictionary_learning"] == pytest.approx(1, abs=1e-6)
    assert found["fvu"] > 0.1


def test_undefined_ratios_are_none_and_json(batch):
    nothing = SparseLatents(torch.zeros(9 * POS, K), torch.zeros(9 * POS, K, dtype=torch.int64))
    zeros = torch.zeros(9, POS, D_MODEL)
    found = metrics_of((batch[0], zeros, nothing))
    assert found["relative_bias"] is None
    assert (found["cosine"], found["norm_ratio"], found["l0"], found["dead"]) == (0, 0, 0, 1)
    constant = metrics_of((zeros + 1, zeros, nothing))
    assert constant["fvu"] is None
    empty = metrics_of(batch, torch.zeros(9, POS, dtype=torch.bool))
    assert empty["mse"] is None
    for result in (found, constant, empty):
        json.dumps(result, allow_nan=False)


def test_a_batch_that_keeps_nothing_adds_nothing(batch):
    keep = some_kept(9)
    keep[:3] = False
    rest = (batch[0][3:], batch[1][3:], SparseLatents(*(t[3 * POS :] for t in batch[2][:2])))
    close(metrics_of(batch, keep, cuts=(3,)), metrics_of(rest, keep[3:]))


def test_large_constant_dimensions_do_not_swallow_the_variance(batch):
    x, x_hat, latents = sample(9, offset=0.0)
    before = metrics_of((x, x_hat, latents), cuts=(4,))["fvu"]
    big = torch.tensor([0, 2.0**14, 0, 0, -(2.0**15), 0])
    after = metrics_of((x + big, x_hat + big, latents), cuts=(4,))["fvu"]
    assert after == pytest.approx(before, rel=1e-3)  # what float32 inputs still hold
    expected = reference((x + big, x_hat + big, latents), torch.ones(9, POS, dtype=torch.bool))
    assert after == pytest.approx(expected["fvu"], rel=1e-6)


def test_sums_of_different_tokens_do_not_go_together(batch):
    layer, _ = sums_of(batch)
    _, sums = sums_of(batch, some_kept(9))
    with pytest.raises(ValueError, match="same tokens"):
        layer_metrics(layer, sums)


# ---- intervals --------------------------------------------------------------------------------


def bootstrap(sequences=9, resamples=50, level=0.9, seed=0):
    return Bootstrap(np.arange(sequences), resamples, level, seed)


def test_each_resample_draws_as_many_sequences_as_there_are():
    weights = bootstrap(resamples=2000).weights
    assert weights.shape == (2000, 9)
    assert (weights.sum(1) == 9).all()
    assert weights.var() == pytest.approx(8 / 9, rel=0.05)  # of multinomial counts
    assert np.array_equal(weights, bootstrap(resamples=2000).weights)
    assert not np.array_equal(weights, bootstrap(resamples=2000, seed=1).weights)


def test_fvu_of_a_resample_is_that_of_the_drawn_sequences(batch):
    keep = some_kept(9)
    layer, sums = sums_of(batch, keep, cuts=(2,))
    boot = bootstrap()
    found = boot.fvu(layer, sums)
    for weights, fvu in zip(boot.weights, found, strict=True):
        drawn = torch.from_numpy(np.repeat(np.arange(9), weights.astype(int)))
        x, y = (t[drawn][keep[drawn]].double() for t in batch[:2])
        expected = (x - y).square().sum() / (x - x.mean(0)).square().sum()
        assert fvu == pytest.approx(float(expected), rel=1e-6)
    assert np.array_equal(boot.fvu(layer, sums), found)


def test_ratio_is_pooled_over_the_drawn_sequences():
    boot = bootstrap()
    loss, tokens = np.random.rand(9), np.random.randint(1, 5, 9).astype(float)
    found = boot.ratio(loss, tokens)
    expected = [(w * loss).sum() / (w * tokens).sum() for w in boot.weights]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_equal_sums_differ_by_exactly_nothing_on_every_resample(batch):
    layer, sums = sums_of(batch)
    boot = bootstrap()
    difference = boot.fvu(layer, sums) - boot.fvu(layer, sums_of(batch)[1])
    assert boot.interval(np.append(0.0, difference)) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_interval_contains_the_truth_as_often_as_its_level_promises():
    chance = np.random.default_rng(0)
    boot = Bootstrap(np.arange(60), 400, 0.9, 0)
    inside = 0
    for _ in range(200):
        values = chance.normal(size=60)
        interval = boot.interval(boot.estimate(values))
        inside += interval["low"] <= 0 <= interval["high"]
    assert 0.83 <= inside / 200 <= 0.95


def test_sequences_of_one_document_are_drawn_together():
    documents = np.array([7, 3, 7, 12, 3, 3])
    boot = Bootstrap(documents, 300, 0.9, 0)
    assert (boot.sequences, boot.documents) == (6, 3)
    for document in (3, 7, 12):
        mine = boot.weights[:, documents == document]
        assert (mine == mine[:, :1]).all()
    assert (boot.weights[:, [0, 1, 3]].sum(1) == 3).all()


def test_intervals_hold_the_truth_where_the_sequences_of_a_document_are_alike():
    """With as many sequences a document each, the width of naive intervals would be a third."""
    chance = np.random.default_rng(0)
    boot = Bootstrap(np.repeat(np.arange(40), 9), 400, 0.9, 0)
    inside = 0
    for _ in range(200):
        values = np.repeat(chance.normal(size=40), 9)
        interval = boot.interval(boot.estimate(values))
        inside += interval["low"] <= 0 <= interval["high"]
    assert 0.83 <= inside / 200 <= 0.95


def test_one_document_has_a_value_but_no_interval():
    boot = bootstrap(sequences=1)
    found = boot.interval(boot.estimate(np.array([4.0]), np.array([2.0])))
    assert found == {"value": 2.0, "low": None, "high": None}


def test_what_is_not_defined_is_none():
    boot = bootstrap(sequences=2)
    one = np.array([1.0, 0.0])
    found = boot.estimate(one, one)  # 0 / 0 on some resamples
    assert np.isnan(found).any()
    assert boot.interval(found) == {"value": 1.0, "low": None, "high": None}
    assert boot.interval(np.array([np.nan, 1.0])) == {"value": None, "low": None, "high": None}


def test_wrong_numbers_of_sequences_are_refused(batch):
    with pytest.raises(ValueError, match="bootstrap of 8"):
        bootstrap(sequences=8).fvu(*sums_of(batch))
    with pytest.raises(ValueError, match="bootstrap of 9"):
        bootstrap().ratio(np.ones(8), np.ones(8))
