"""Cross-entropy, KL and what is made of them, against a plain float64 reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.evaluation import effect
from groupsae.evaluation.effect import CleanPredictions, effect_metrics
from groupsae.lm.splice import Splicer
from tests.helpers.lms import frozen

BLOCKS, POS, VOCAB = 4, 9, 50


def draw(seed=0, scale=3.0, vocab=VOCAB):
    chance = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(BLOCKS, POS, vocab, generator=chance)
    other = logits + 0.3 * scale * torch.randn(BLOCKS, POS, vocab, generator=chance)
    tokens = torch.randint(0, vocab, (BLOCKS, POS), generator=chance)
    keep = torch.rand(BLOCKS, POS, generator=chance) > 0.3
    return logits, other, tokens, keep


def reference(logits, other, tokens, keep):
    """Return sums of ce of both and of kl, and counts, per block: one position at a time."""
    log_p, log_q = (torch.log_softmax(z.double(), -1) for z in (logits, other))
    sums = np.zeros((4, len(tokens)))
    for block in range(len(tokens)):
        for t in range(tokens.shape[1] - 1):
            if keep is None or keep[block, t]:
                p, q, target = log_p[block, t], log_q[block, t], tokens[block, t + 1]
                kl = (p.exp() * (p - q)).sum()
                sums[:, block] += [-p[target], -q[target], kl, 1]
    return sums


@pytest.mark.parametrize("numbers", [1, 64, 7 * VOCAB, 2**18])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_are_those_of_the_reference(monkeypatch, masked, numbers):
    monkeypatch.setattr(effect, "CHUNK_CPU", numbers)
    logits, other, tokens, keep = draw()
    keep = keep if masked else None
    clean = CleanPredictions(logits, tokens, keep)
    ce, kl = clean.compare(other)
    expected = reference(logits, other, tokens, keep)
    np.testing.assert_allclose(clean.ce, expected[0], rtol=1e-6)
    np.testing.assert_allclose(ce, expected[1], rtol=1e-6)
    np.testing.assert_allclose(kl, expected[2], rtol=1e-6)
    np.testing.assert_array_equal(clean.predictions, expected[3])


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    scale=st.floats(0.01, 30),
    shift=st.floats(-100, 100),
    vocab=st.integers(1, 300),
)
def test_any_logits_agree_with_the_reference(seed, scale, shift, vocab):
    logits, other, tokens, keep = draw(seed, scale, vocab)
    other = other + shift
    clean = CleanPredictions(logits, tokens, keep)
    ce, kl = clean.compare(other)
    expected = reference(logits, other, tokens, keep)
    # float32 logits: their rounding error grows with their size
    tolerance = {"rtol": 2e-6, "atol": 2e-6 * (1 + scale + abs(shift)) * POS}
    np.testing.assert_allclose(clean.ce, expected[0], **tolerance)
    np.testing.assert_allclose(ce, expected[1], **tolerance)
    np.testing.assert_allclose(kl, expected[2], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_logits_give_the_clean_loss_and_no_divergence_exactly(dtype):
    logits, _, tokens, keep = draw()
    clean = CleanPredictions(logits.to(dtype), tokens, keep)
    ce, kl = clean.compare(logits.to(dtype).clone())
    assert torch.equal(ce, clean.ce)
    assert torch.equal(kl, torch.zeros(BLOCKS, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_full_precision(dtype):
    logits, other, tokens, keep = draw()
    logits, other = logits.to(dtype), other.to(dtype)
    clean = CleanPredictions(logits, tokens, keep)
    ce, kl = clean.compare(other)
    expected = reference(logits, other, tokens, keep)
    np.testing.assert_allclose(clean.ce, expected[0], rtol=1e-6)
    np.testing.assert_allclose(ce, expected[1], rtol=1e-6)
    np.testing.assert_allclose(kl, expected[2], rtol=1e-6)


def test_a_small_divergence_is_not_lost_in_the_size_of_the_logits():
    logits, _, tokens, _ = draw(scale=5.0)
    other = logits.clone()
    other[..., 0] += 0.01
    _, kl = CleanPredictions(logits, tokens, None).compare(other)
    expected = reference(logits, other, tokens, None)[2]
    np.testing.assert_allclose(kl, expected, atol=1e-6 * (POS - 1))


def test_batches_may_be_cut_anywhere():
    logits, other, tokens, keep = draw()
    whole = CleanPredictions(logits, tokens, keep)
    ce, kl = whole.compare(other)
    for block in range(BLOCKS):
        one = slice(block, block + 1)
        part = CleanPredictions(logits[one], tokens[one], keep[one])
        part_ce, part_kl = part.compare(other[one])
        assert torch.equal(part.ce, whole.ce[one])
        assert torch.equal(part.predictions, whole.predictions[one])
        assert torch.equal(part_ce, ce[one])
        assert torch.equal(part_kl, kl[one])


def test_positions_left_out_do_not_matter_even_if_they_are_not_finite():
    logits, other, tokens, keep = draw()
    spoilt, spoilt_other = logits.clone(), other.clone()
    spoilt[~keep], spoilt_other[~keep] = float("nan"), float("nan")
    spoilt[:, -1] = float("nan")
    clean, bad = (CleanPredictions(z, tokens, keep) for z in (logits, spoilt))
    assert torch.equal(bad.ce, clean.ce)
    for a, b in zip(clean.compare(other), bad.compare(spoilt_other), strict=True):
        assert torch.equal(a, b)
    assert bool(keep[:, -1].any())  # the mask handed in is as it was


def test_a_block_without_any_kept_position_sums_to_nothing():
    logits, other, tokens, keep = draw()
    keep[1] = False
    clean = CleanPredictions(logits, tokens, keep)
    ce, kl = clean.compare(other)
    assert clean.predictions[1] == clean.ce[1] == ce[1] == kl[1] == 0


MEANS = {"clean": 2.0, "ce": 2.5, "kl": 0.25, "zero": 10.0, "mean": 6.0, "kl_zero": 8.0}


def test_metrics_of_known_means():
    assert effect_metrics(**MEANS) == {
        "ce": 2.5,
        "delta_ce": 0.5,
        "delta_ce_percent": 25.0,
        "ce_score": 7.5 / 8,
        "ce_score_mean": 3.5 / 4,
        "kl": 0.25,
        "kl_score": 7.75 / 8,
    }


def test_no_loss_is_a_score_of_one_and_zero_ablation_one_of_zero():
    perfect = effect_metrics(**MEANS | {"ce": 2.0, "kl": 0.0})
    assert (perfect["delta_ce"], perfect["delta_ce_percent"]) == (0, 0)
    assert perfect["ce_score"] == perfect["ce_score_mean"] == perfect["kl_score"] == 1
    ablated = effect_metrics(**MEANS | {"ce": 10.0, "kl": 8.0})
    assert ablated["ce_score"] == ablated["kl_score"] == 0
    assert effect_metrics(**MEANS | {"ce": 6.0})["ce_score_mean"] == 0


def test_samples_give_samples_element_by_element():
    chance = np.random.default_rng(0)
    samples = {name: value * chance.uniform(0.9, 1.1, 20) for name, value in MEANS.items()}
    together = effect_metrics(**samples)
    for i in range(20):
        alone = effect_metrics(**{name: float(values[i]) for name, values in samples.items()})
        assert alone == {name: values[i] for name, values in together.items()}


def test_a_score_without_a_range_is_nan_not_an_error():
    flat = effect_metrics(**MEANS | {"zero": 2.0, "kl_zero": 0.0})
    assert math.isnan(flat["ce_score"])
    assert math.isnan(flat["kl_score"])
    assert flat["ce_score_mean"] == 3.5 / 4
    samples = {name: np.full(3, value) for name, value in MEANS.items()}
    samples["zero"][1] = 2.0
    assert np.isnan(effect_metrics(**samples)["ce_score"]).tolist() == [False, True, False]


@pytest.fixture(scope="module")
def spliced(tiny_lm):
    lm = frozen(tiny_lm)
    splicer = Splicer(lm.load_with_head(torch.device("cpu")))
    tokens = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))
    logits, residuals = splicer.clean(tokens, range(4))
    return splicer, residuals, CleanPredictions(logits, tokens, None)


@pytest.mark.parametrize("layer", range(4))
def test_a_perfect_reconstruction_costs_nothing_exactly(spliced, layer):
    splicer, residuals, clean = spliced
    ce, kl = clean.compare(splicer.resume(layer, residuals[layer].clone()))
    assert torch.equal(ce - clean.ce, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(kl, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("layer", range(4))
def test_zeros_are_zero_ablation_exactly_and_more_damage_costs_more(spliced, layer):
    splicer, residuals, clean = spliced
    x = residuals[layer]
    zero = clean.compare(splicer.resume(layer, torch.zeros_like(x)))
    hooked = clean.compare(splicer.together(lambda _, residual: 0 * residual, [layer]))
    assert torch.equal(zero[0], hooked[0])
    assert torch.equal(zero[1], hooked[1])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * x.std()
    divergences = [
        float(clean.compare(splicer.resume(layer, x + s * noise))[1].sum()) for s in (0.1, 0.4, 2)
    ]
    assert 0 < divergences[0] < divergences[1] < divergences[2]
