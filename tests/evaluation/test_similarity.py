"""Similarity of SAEs: against loops over all pairs of latents."""

import numpy as np
import pytest
import torch

from groupsae.evaluation import similarity
from groupsae.evaluation.similarity import Firings, max_jaccard, mmco, mmcs
from groupsae.sae.base import SparseLatents

TOKENS, K = 60, 4


@pytest.fixture(params=[None, 64], ids=["at once", "in slices"])
def chunk(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(similarity, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
def test_mmcs_is_the_largest_cosine_of_each_baseline_latent():
    first, second = torch.randn(13, 6) * 5, torch.randn(21, 6)
    expected = torch.nn.functional.cosine_similarity(
        first[:, None].double(), second[None].double(), dim=-1
    )
    torch.testing.assert_close(
        mmcs(first, second).double(), expected.amax(1), rtol=1e-6, atol=1e-6
    )


def test_mmcs_with_itself_is_one_whatever_order_and_scale():
    weights = torch.randn(50, 8)
    other = weights[torch.randperm(50)] * torch.rand(50, 1).add(0.1)
    torch.testing.assert_close(mmcs(weights, other), torch.ones(50))


def test_mmcs_is_directional():
    weights = torch.randn(30, 8)
    assert mmcs(weights[:5], weights).mean() == pytest.approx(1)
    assert mmcs(weights, weights[:5]).mean() < 0.95


def test_a_latent_of_norm_zero_has_cosine_zero():
    assert mmcs(torch.zeros(1, 3), torch.ones(2, 3)).tolist() == [0]


def latents_of(n, tokens=TOKENS):
    """Return latents of n, of which many are zero; the last fifth never fire."""
    scores = torch.randn(tokens, n)
    scores[:, -n // 5 :] = -1
    values, indices = scores.topk(K)
    return SparseLatents((values - 0.7).relu(), indices)


def on(latents, n):
    dense = torch.zeros(len(latents.acts), n).scatter(1, latents.indices, latents.acts)
    return (dense > 0).numpy()


def jaccards(first, second):
    """Return the best similarity of each column of first to any of second; nan if empty."""
    best = []
    for i in range(first.shape[1]):
        a = first[:, i]
        pairs = [(a & b).sum() / (a | b).sum() for b in second.T if (a | b).any()]
        best.append(max(pairs) if a.any() else np.nan)
    return best


def firings(latents, n, keep=None):
    seen = Firings(n)
    seen.update(latents, keep)
    return seen


@pytest.mark.usefixtures("chunk")
def test_co_firing_equals_a_loop_over_all_pairs():
    first, second = latents_of(20), latents_of(30)
    pair = firings(first, 20), firings(second, 30)
    expected = jaccards(on(first, 20), on(second, 30))
    assert np.isnan(expected).sum() >= 4
    np.testing.assert_allclose(max_jaccard(*pair), expected, rtol=1e-12)
    assert mmco(*pair) == pytest.approx(np.nanmean(expected), rel=1e-12)


def test_batches_and_left_out_tokens():
    first, second, keep = latents_of(20), latents_of(30), torch.rand(TOKENS) > 0.4
    pair = Firings(20), Firings(30)
    for rows in torch.randperm(TOKENS).split(17):
        for seen, latents in zip(pair, (first, second), strict=True):
            seen.update(SparseLatents(*(t[rows] for t in latents[:2])), keep[rows])
    expected = jaccards(on(first, 20)[keep], on(second, 30)[keep])
    np.testing.assert_allclose(max_jaccard(*pair), expected, rtol=1e-12)


def test_an_sae_fires_with_itself_under_other_numbers():
    latents, order = latents_of(40), torch.randperm(40)
    renamed = SparseLatents(latents.acts, order[latents.indices])
    assert mmco(firings(latents, 40), firings(renamed, 40)) == 1


def test_latents_that_never_fire_together_have_zero():
    fires = SparseLatents(torch.tensor([[1.0], [0.0]]), torch.tensor([[0], [0]]))
    later = SparseLatents(torch.tensor([[0.0], [1.0]]), torch.tensor([[0], [0]]))
    pair = firings(fires, 2), firings(later, 1)
    np.testing.assert_array_equal(max_jaccard(*pair), [0, np.nan])
    assert mmco(*pair) == 0


def test_nothing_fired():
    assert mmco(Firings(3), Firings(3)) is None
    silent = SparseLatents(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    assert mmco(firings(silent, 3), firings(silent, 3)) is None


def test_many_latents_need_wider_indices():
    latents = SparseLatents(torch.ones(2, 1), torch.tensor([[65_536], [0]]))
    best = max_jaccard(firings(latents, 65_537), firings(latents, 65_537))
    assert (best[0], best[65_536]) == (1, 1)


def test_different_tokens_are_refused():
    with pytest.raises(ValueError, match="different tokens"):
        max_jaccard(firings(latents_of(20), 20), firings(latents_of(20, 10), 20))
