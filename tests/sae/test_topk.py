"""The TopK autoencoder against loops, against autograd on a dense version, and by hand."""

import math

import pytest
import torch

from groupsae.runtime.errors import UserError
from groupsae.sae.base import GlobalBatch, SparseLatents
from groupsae.sae.topk import TopK
from groupsae.training.group import GroupSAE
from groupsae.training.optim import Adam

EXACT = {"rtol": 1e-12, "atol": 1e-14}  # float64, sums in another order


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_sae(dtype=torch.float64, noise=0.3, **changes):
    """Return an SAE away from its symmetric start: untied, with biases."""
    sae = TopK(**({"d_model": 6, "expansion": 4, "k": 3} | changes), generator=generator())
    sae = sae.to(dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator(1), dtype=dtype)
    sae.normalize_decoder()
    return sae


def make_x(rows=40, d_model=6, dtype=torch.float64, seed=2):
    return torch.randn(rows, d_model, generator=generator(seed), dtype=dtype)


def dense_pre_acts(sae, x):
    """W_enc (x - b_dec) + b_enc, one number at a time."""
    out = torch.empty(len(x), sae.d_sae, dtype=x.dtype)
    for row in range(len(x)):
        for latent in range(sae.d_sae):
            centred = [x[row, i] - sae.b_dec[i] for i in range(sae.d_model)]
            out[row, latent] = sae.b_enc[latent] + sum(
                w * c for w, c in zip(sae.W_enc[latent], centred, strict=True)
            )
    return out


def dense_latents(sae, x, allowed=None, k=None):
    """TopK of ReLU as a dense matrix, differentiable: a mask times the ReLU."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    ranked = pre if allowed is None else pre.masked_fill(~allowed, -math.inf)
    mask = torch.zeros_like(pre)
    for row in range(len(x)):
        best = sorted(range(sae.d_sae), key=lambda j: -ranked[row, j].item())
        mask[row, best[: sae.k if k is None else k]] = 1
    return mask * pre.relu()


def dense_losses(sae, x, total_variance, dead):
    """Both loss terms from their formulas, with dense matrices only."""
    x_hat = dense_latents(sae, x) @ sae.W_dec + sae.b_dec
    losses = {"fvu": (x - x_hat).square().sum() / total_variance}
    if len(dead):
        num_dead, limit = len(dead), max(1, round(0.5 * sae.d_model))
        allowed = torch.zeros(sae.d_sae, dtype=torch.bool)
        allowed[dead] = True
        predicted = dense_latents(sae, x, allowed, min(num_dead, limit)) @ sae.W_dec
        squares = ((x - x_hat).detach() - predicted).square().sum()
        losses["auxk"] = sae.auxk_alpha * min(num_dead / limit, 1) * squares / total_variance
    return losses


def scatter(sae, latents):
    dense = torch.zeros(len(latents.acts), sae.d_sae, dtype=latents.acts.dtype)
    return dense.scatter(1, latents.indices, latents.acts)


def dead_latents(latents):
    return torch.tensor(latents, dtype=torch.int64)


def test_pre_activations_equal_a_loop():
    sae, x = make_sae(), make_x(5)
    torch.testing.assert_close(sae.pre_acts(x), dense_pre_acts(sae, x), **EXACT)


@pytest.mark.parametrize("k", [1, 3, 24])
def test_encode_and_decode_equal_the_dense_topk_of_relu(k):
    sae, x = make_sae(k=k), make_x()
    latents, expected = sae.encode(x), dense_latents(sae, x)
    assert latents.acts.shape == latents.indices.shape == (len(x), k)
    assert (latents.acts >= 0).all()
    torch.testing.assert_close(scatter(sae, latents), expected, **EXACT)
    torch.testing.assert_close(sae.decode(latents), expected @ sae.W_dec + sae.b_dec, **EXACT)


@pytest.mark.parametrize("dead", [[], [4], [1, 4], [0, 1, 2, 3, 4, 5, 20]])
def test_loss_terms_equal_their_formulas(dead):
    sae, x, variance = make_sae(), make_x(), torch.tensor(77.0, dtype=torch.float64)
    dead = dead_latents(dead)
    output, expected = sae(x, GlobalBatch(variance, dead)), dense_losses(sae, x, variance, dead)
    assert output.losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[name], value, **EXACT)
    torch.testing.assert_close(output.reconstruction, sae.decode(sae.encode(x)), **EXACT)


@pytest.mark.parametrize("dead", [[], [1, 4], [0, 1, 2, 3, 4, 5, 20]])
def test_gradients_equal_autograd_through_the_dense_version(dead):
    sae, x, variance = make_sae(), make_x(), torch.tensor(77.0, dtype=torch.float64)
    dead = dead_latents(dead)
    parameters = dict(sae.named_parameters())
    ours = torch.autograd.grad(
        sum(sae(x, GlobalBatch(variance, dead)).losses.values()), list(parameters.values())
    )
    dense = torch.autograd.grad(
        sum(dense_losses(sae, x, variance, dead).values()), list(parameters.values())
    )
    for name, mine, expected in zip(parameters, ours, dense, strict=True):
        torch.testing.assert_close(mine, expected, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def three_latents(k=1):
    """Latents along x, y and -x in the plane; all biases zero but the decoder's."""
    sae = TopK(d_model=3, expansion=1, k=k, auxk_alpha=0.5, auxk_share=1 / 3)
    directions = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0]])
    with torch.no_grad():
        sae.W_enc.copy_(directions)
        sae.W_dec.copy_(directions)
    return sae


def test_auxk_worked_by_hand_on_three_latents():
    sae = three_latents()
    with torch.no_grad():
        sae.b_dec.copy_(torch.tensor([0.0, 0.0, 5.0]))
    # x - b_dec = (3, 2, 0): latent 0 fires with 3, so x - x_hat = (0, 2, 0). Latent 1 is dead and
    # would fire with 2: its share of the reconstruction, without the bias, is just the error.
    x, one = torch.tensor([[3.0, 2.0, 5.0]]), torch.tensor(1.0)
    losses = sae(x, GlobalBatch(one, torch.tensor([1]))).losses
    assert losses["fvu"].item() == 4.0
    assert losses["auxk"].item() == 0.0  # sign wrong: 0.5 * 16; with the bias: 0.5 * 25
    # With latent 2 dead instead, nothing can predict the error: 0.5 * 2^2.
    assert sae(x, GlobalBatch(one, torch.tensor([2]))).losses["auxk"].item() == 2.0


def test_auxk_trains_dead_latents_only_and_not_the_error_that_they_predict():
    sae, x, one = three_latents(), torch.tensor([[3.0, 2.5, 0.0]]), torch.tensor(1.0)
    with torch.no_grad():
        sae.W_enc[1, 1] = 0.5  # predicts 1.25 of 2.5
    sae(x, GlobalBatch(one, torch.tensor([1]))).losses["auxk"].backward()
    # L = 0.5 (2.5 - w z)^2 with z = 1.25, w = 1: dL/dw = -z 1.25, dL/dW_enc = -w 1.25 x
    torch.testing.assert_close(
        sae.W_dec.grad, torch.tensor([[0.0] * 3, [0, -1.5625, 0], [0.0] * 3])
    )
    torch.testing.assert_close(
        sae.W_enc.grad, torch.tensor([[0.0] * 3, [-3.75, -3.125, 0], [0.0] * 3])
    )


def test_auxk_gets_its_full_weight_only_with_enough_dead_latents():
    sae, x, one = make_sae(auxk_share=1.0), make_x(), torch.tensor(1.0, dtype=torch.float64)
    sae.b_enc.data[:] = -100.0  # no latent fires: e_hat = 0 whatever is dead
    squares = (x - sae.b_dec).square().sum()
    for num_dead, share in [(1, 1 / 6), (3, 0.5), (6, 1.0), (20, 1.0)]:
        loss = sae(x, GlobalBatch(one, dead_latents(list(range(num_dead))))).losses["auxk"]
        torch.testing.assert_close(loss, squares * share / 32, **EXACT)


def test_auxk_is_absent_without_dead_latents_or_without_weight():
    sae, x, one = make_sae(), make_x(), torch.tensor(1.0, dtype=torch.float64)
    assert sae(x, GlobalBatch(one, dead_latents([]))).losses.keys() == {"fvu"}
    off = make_sae(auxk_alpha=0)
    assert off(x, GlobalBatch(one, dead_latents([1, 2]))).losses.keys() == {"fvu"}


def group_of(sae_factory, d_model, layers=(0,), dead_after=10, optim=None):
    optim = optim or Adam(base_lr=1e-3, base_d_sae=2**10)
    return GroupSAE(
        name="g", layers=list(layers), norm_factors=dict.fromkeys(layers, 1.0), sae=sae_factory,
        d_model=d_model, optim=optim, dead_after=dead_after, b_dec_start="zero",
        nonfinite="stop", seed=0,
    )  # fmt: skip


def test_selected_latents_of_value_zero_do_not_count_as_fired():
    group = group_of(lambda **_: three_latents(k=2), d_model=3)
    # (1, -1, 0): the two best of (1, -1, -1) are latent 0 and one whose ReLU is zero
    acts, layers = torch.tensor([[1.0, -1.0, 0.0], [2.0, -1.0, 0.0]]), torch.tensor([0, 0])
    group.step(acts, layers, group.moments(acts, layers))
    assert group.fired.tolist() == [1, 0, 0]


def test_the_projected_gradient_has_no_part_along_the_latents():
    sae, x = make_sae(), make_x()
    one = torch.tensor(1.0, dtype=torch.float64)
    sum(sae(x, GlobalBatch(one, dead_latents([1, 4]))).losses.values()).backward()
    before = sae.W_dec.grad.clone()
    sae.project_gradient()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-13)
    removed = before - sae.W_dec.grad  # what is gone was parallel
    parallel = (removed * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    torch.testing.assert_close(removed, parallel, rtol=1e-10, atol=1e-12)
    assert removed.norm() > 0.01 * before.norm()


def test_projection_without_a_gradient_does_nothing():
    sae = make_sae()
    sae.project_gradient()
    assert sae.W_dec.grad is None


def test_normalize_decoder_keeps_directions_and_makes_unit_vectors():
    sae = make_sae()
    before = sae.W_dec.detach().clone()
    sae.W_dec.data *= torch.rand(24, 1, generator=generator(3), dtype=torch.float64) + 0.5
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec.detach(), before, **EXACT)


def test_a_fresh_sae_has_unit_decoder_tied_encoder_and_zero_biases():
    sae = make_sae(dtype=torch.float32, noise=0)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    torch.testing.assert_close(sae.W_enc, sae.W_dec, rtol=0, atol=1e-6)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


@pytest.mark.parametrize("k", [0, 25, -1])
def test_an_impossible_k_is_refused_with_the_number_of_latents(k):
    with pytest.raises(UserError, match=f"sae.k is {k}.* 24 latents"):
        make_sae(k=k)


def test_an_impossible_expansion_is_refused():
    with pytest.raises(UserError, match="sae.expansion is 0"):
        make_sae(expansion=0)


def test_decode_takes_latents_from_anywhere():
    sae = make_sae()
    latents = SparseLatents(torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[7]]))
    torch.testing.assert_close(sae.decode(latents)[0], 2 * sae.W_dec[7] + sae.b_dec, **EXACT)


def test_weights_are_drawn_on_the_generators_device_and_go_to_the_default_one():
    # Lightning builds modules with the accelerator as the default device
    with torch.device("meta"):
        sae = TopK(d_model=8, expansion=2, k=2, generator=torch.Generator("cpu"))
    assert {p.device.type for p in sae.parameters()} == {"meta"}
