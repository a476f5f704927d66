"""One layer's SAE of a suite, of every kind: raw activations in, latents, raw activations out."""

import sys

import numpy as np
import pytest
import torch

import groupsae
from groupsae.runtime.errors import UserError
from tests.helpers.shelf import D_MODEL, D_SAE, FACTORS, KINDS, naive, rows, run_folder, tensors_of


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def suite(kind, tmp_path_factory):
    return groupsae.load_suite(run_folder(tmp_path_factory.mktemp(kind) / "run", kind))


@pytest.fixture(scope="module")
def topk(tmp_path_factory):
    return groupsae.load_suite(run_folder(tmp_path_factory.mktemp("topk") / "run", "topk"))


@pytest.mark.parametrize("layer", FACTORS)
def test_a_layer_computes_what_its_architecture_is_defined_as(suite, kind, layer):
    """Latents and reconstruction of raw activations against a naive float64 reference."""
    sae, x = suite[layer], rows()
    acts, x_hat = naive(kind, tensors_of(kind, 1 if layer == 3 else 0), x * FACTORS[layer])
    torch.testing.assert_close(sae.encode(x).double(), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x).double(), x_hat / FACTORS[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", FACTORS)
def test_a_layer_gives_the_numbers_of_the_group_bit_for_bit(suite, layer):
    sae, x, factor = suite[layer], rows(), FACTORS[layer]
    with torch.no_grad():
        values, indices, _ = found = sae.sae.encode(x * factor)
        dense = torch.zeros(len(x), D_SAE).scatter(1, indices, values)
        assert torch.equal(sae.encode(x), dense)
        assert torch.equal(suite.encode(x, layer), dense)
        sparse = sae.encode_sparse(x)
        assert torch.equal(sparse.acts, values)
        assert torch.equal(sparse.indices, indices)
        assert torch.equal(sae.decode(dense), sae.sae.decode_dense(dense) / factor)
        assert torch.equal(suite.decode(dense, layer), sae.decode(dense))
        assert torch.equal(sae.decode(sparse), sae.sae.decode(found) / factor)
        assert torch.equal(suite.decode_sparse(found, layer), sae.decode(sparse))
        assert torch.equal(sae(x), sae.decode(sparse))
        assert torch.equal(suite.reconstruct(x, layer), sae.decode(dense))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3), (0,), (0, 4)])
def test_any_leading_shape_is_kept_by_all_uses(suite, shape):
    sae = suite[1]
    x = torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(0))
    dense, sparse = sae.encode(x), sae.encode_sparse(x)
    assert dense.shape == (*shape, D_SAE)
    assert sparse.acts.shape == sparse.indices.shape == (*shape, sparse.acts.shape[-1])
    assert torch.equal(torch.zeros_like(dense).scatter(-1, sparse.indices, sparse.acts), dense)
    assert sae(x).shape == sae.decode(dense).shape == sae.decode(sparse).shape == x.shape
    torch.testing.assert_close(sae.decode(dense), sae(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_activations_of_any_precision_and_arrays_are_taken(topk, dtype):
    sae, x = topk[3], rows().to(dtype)
    assert torch.equal(sae.encode(x), sae.encode(x.float()))
    assert torch.equal(
        sae.decode(sae.encode(x).to(dtype)).float().isfinite(), torch.ones(40, 16) > 0
    )
    array = x.float().numpy().astype(np.float64)
    array.setflags(write=False)
    assert torch.equal(sae.encode(array), sae.encode(x.float()))
    assert torch.equal(sae.decode(sae.encode(x).numpy()), sae.decode(sae.encode(x)))


def test_weights_are_views_in_the_orientation_of_saelens(suite, kind):
    sae, tensors = suite[3], tensors_of(kind, 1)
    assert torch.equal(sae.W_enc, tensors["W_enc"].T)
    assert torch.equal(sae.W_dec, tensors["W_dec"])
    assert torch.equal(sae.b_enc, tensors["b_gate" if kind == "gated" else "b_enc"])
    assert torch.equal(sae.b_dec, tensors["b_dec"])
    assert (sae.d_model, sae.d_sae) == (D_MODEL, D_SAE) == tuple(sae.W_enc.shape)
    for weight, own in (
        (sae.W_enc, sae.sae.W_enc),
        (sae.W_dec, sae.sae.W_dec),
        (sae.b_dec, sae.sae.b_dec),
    ):
        assert weight.data_ptr() == own.data_ptr()
    assert suite[0].W_dec is suite[1].W_dec


def test_a_layer_knows_its_place(topk):
    sae = topk[1]
    assert (sae.layer, sae.layers, sae.group) == (1, [0, 1], "layers.0-1")
    assert sae.norm_factor == FACTORS[1]
    assert sae.cfg is topk.configs["layers.0-1"]
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.float32)
    assert repr(sae) == (
        "LayerSAE(layer=1, group='layers.0-1', sae=TopK(d_model=16, d_sae=48, k=5), "
        "norm_factor=2.1)"
    )


def test_a_suite_is_a_collection_of_layers(topk):
    assert [sae.layer for sae in topk] == topk.layers == [0, 1, 3]
    assert len(topk) == 3
    assert 3 in topk
    assert 2 not in topk
    assert topk[3] is topk[np.int64(3)]
    assert topk.groups == {"layers.0-1": [0, 1], "layers.3": [3]}
    for wrong in (2, -1):
        with pytest.raises(UserError, match=r"no SAE for layer .* covers layers \[0, 1, 3\]"):
            topk[wrong]


def test_a_direction_is_what_a_latent_adds_to_the_raw_residual_stream(suite):
    sae = suite[1]
    nothing = torch.zeros(D_SAE)
    for latent in (0, 17, D_SAE - 1):
        one = nothing.clone()
        one[latent] = 1.0
        torch.testing.assert_close(sae.decode(one) - sae.decode(nothing), sae.direction(latent))
    assert torch.equal(sae.direction(17), sae.W_dec[17] / FACTORS[1])
    assert torch.equal(sae.direction([3, 17])[1], sae.direction(17))
    assert torch.equal(sae.direction(np.array([3, 17]))[1], sae.direction(np.int64(17)))
    assert sae.direction(torch.tensor([[1, 2, 3]])).shape == (1, 3, D_MODEL)


@pytest.mark.parametrize("latent", [-1, D_SAE, [0, D_SAE + 3]])
def test_a_latent_out_of_range_is_refused(topk, latent):
    with pytest.raises(UserError, match=r"out of range: layers\.3 has 48 latents, 0 to 47"):
        topk[3].direction(latent)


def test_wrong_widths_and_devices_are_one_sentence(topk):
    sae = topk[3]
    with pytest.raises(UserError, match=r"layer 3 have .*\[2, 17\], .* takes .* 16\]"):
        sae(torch.zeros(2, 17))
    with pytest.raises(UserError, match=r"latents of layer 3 have .*takes .* 48\]"):
        sae.decode(np.zeros((2, 5)))
    for use in (sae.encode, sae.encode_sparse, sae):
        with pytest.raises(
            UserError, match=r"are on meta and its SAE is on cpu: .*suite\.to\('me"
        ):
            use(torch.zeros(2, 16, device="meta"))


def test_gradients_reach_the_activations_and_never_the_weights(suite):
    sae, x = suite[3], rows(4).requires_grad_()
    assert not sae(x.detach()).requires_grad
    for out in (sae(x), sae.decode(sae.encode(x))):
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.abs().sum() > 0
    assert not any(weight.requires_grad for weight in sae.parameters())
    assert not any(module.training for module in sae.modules())
    assert not suite.encode(x, 3).requires_grad


def test_layers_of_a_group_move_together(tmp_path):
    suite = groupsae.load_suite(run_folder(tmp_path / "run", "topk"))
    assert suite[0].to(torch.float64) is suite[0]
    assert suite[1].dtype == torch.float64
    assert suite[3].dtype == torch.float32
    assert suite[1].encode(rows()).dtype == torch.float64
    assert suite.to(torch.bfloat16)[3].encode(rows()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["sae_lens", "sparsify", "dictionary_learning"])
def test_a_library_that_is_not_installed_is_named_with_its_command(topk, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.utils", None)
    method = {"sae_lens": "to_saelens"}.get(name, f"to_{name}")
    package = {"sparsify": "eai-sparsify"}.get(name, name.replace("_", "-"))
    with pytest.raises(UserError, match=rf"{method}\(\) needs .*: pip install {package}"):
        getattr(topk[3], method)()


def test_sparsify_holds_topk_only(suite, kind):
    if kind != "topk":
        with pytest.raises(UserError, match=f"can hold topk only, and layers.3 is a {kind} SAE"):
            suite[3].to_sparsify()
