"""Every spelling of a configuration gives what its library gives, or is refused.

The references are the forwards of the libraries, in numpy and by their names.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from groupsae.interop.dictionary_learning import parse_name
from groupsae.interop.formats import FORMATS
from groupsae.interop.library import parse_module_path, same_output
from groupsae.runtime.errors import UserError
from groupsae.suite.exporting import export_suite
from groupsae.suite.importing import ReadAt, read_folder
from groupsae.suite.suite import load_suite
from tests.helpers.families import config_of
from tests.helpers.foreign import dictionary, saelens, sparsify
from tests.helpers.lms import frozen
from tests.helpers.shelf import (
    D_MODEL,
    D_SAE,
    K,
    dense,
    edit,
    facts_of,
    rows,
    run_folder,
    tensors_of,
)

n, d = D_SAE, D_MODEL
HOOK = "blocks.2.hook_resid_post"


def relu(x):
    return np.maximum(x, 0)


def saelens_latents(kind, tensors, x, *, subtract=True, k=K, by_norm=False):
    """Return what `SAE.encode` of SAELens gives, in float64."""
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    x = x.double().numpy() - t["b_dec"] * subtract
    if kind == "gated":
        gate = x @ t["W_enc"].T + t["b_gate"] > 0
        return gate * relu(x @ (t["W_enc"].T * np.exp(t["r_mag"])) + t["b_mag"])
    pre = x @ t["W_enc"].T + t["b_enc"]
    if kind == "jumprelu":
        return relu(pre) * (pre > t["threshold"])
    if kind == "topk":
        pre = pre * (np.linalg.norm(t["W_dec"], axis=1) if by_norm else 1.0)
        smallest = np.sort(pre, axis=1)[:, -k, None]
        return relu(pre) * (pre >= smallest)
    return relu(pre)


def same_latents(found, expected, x):
    assert (expected > 0).any()
    np.testing.assert_allclose(dense(found.sae, x).numpy(), expected, rtol=1e-4, atol=1e-5)


def old(folder: Path, kind="topk", **config) -> Path:
    """Write a folder with the flat keys of SAELens before version 6."""
    saelens(folder, tensors_of(kind))
    values = {"d_in": d, "d_sae": n, "dtype": "float32", "hook_point": HOOK, "hook_point_layer": 2}
    values = {key: value for key, value in (values | config).items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(values))
    return folder


TOPK = {"activation_fn_kwargs": {"k": 8}}
OLD = {  # kind that SAELens 6.54 loads, and the keys
    "no keys": ("relu", {}),
    "relu": ("relu", {"activation_fn_str": "relu", "activation_fn_kwargs": {}}),
    "standard": ("relu", {"architecture": "standard", "activation_fn": "relu"}),
    "topk": ("topk", {"activation_fn": "topk", **TOPK}),
    "topk as str": ("topk", {"activation_fn_str": "topk", **TOPK}),
    "topk in standard": ("topk", {"architecture": "standard", "activation_fn": "topk", **TOPK}),
    "topk twice": ("topk", {"architecture": "topk", "activation_fn_str": "topk", **TOPK}),
    "topk and relu": ("topk", {"architecture": "topk", "activation_fn": "relu", **TOPK}),
    "k twice": ("topk", {"activation_fn": "topk", "k": 3, **TOPK}),
    "version 5": ("topk", {"sae_lens_version": "5.11.0", "activation_fn_str": "topk", **TOPK}),
    "jumprelu": ("jumprelu", {"architecture": "jumprelu", "activation_fn_str": "relu"}),
    "gated": ("gated", {"architecture": "gated", "activation_fn_str": "relu"}),
}


@pytest.mark.parametrize("name", OLD)
def test_old_keys_of_saelens_name_the_kind(tmp_path, name):
    (kind, config), x = OLD[name], rows()
    found = FORMATS["saelens"].read(old(tmp_path / "sae", kind, **config))
    assert (found.layers, found.place.hookpoint) == ([2], "resid_post")
    same_latents(found, saelens_latents(kind, tensors_of(kind), x, k=8), x)


@pytest.mark.parametrize(
    "keys",
    [
        {"normalize_activations": False},
        {"normalize_activations": "none", "finetuning_scaling_factor": False},
        {"apply_b_dec_to_input": False},
        {"noise_scale": 0.1, "l1_coefficient": 1, "use_ghost_grads": True, "lp_norm": 1.0},
        {"hook_point": "blocks.{layer}.hook_resid_post"},
        {"hook_point": None, "hook_name": HOOK, "hook_head_index": None},
        {"hook_point": "transformer.h.2"},
        {"dtype": "torch.bfloat16", "device": "mps"},
    ],
)
def test_other_old_keys_are_read_as_saelens_does(tmp_path, keys):
    x = rows()
    found = FORMATS["saelens"].read(old(tmp_path / "sae", "relu", **keys))
    subtract = keys.get("apply_b_dec_to_input", True)
    assert (found.layers, found.place.hookpoint) == ([2], "resid_post")
    same_latents(found, saelens_latents("relu", tensors_of("relu"), x, subtract=subtract), x)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation_fn": "topk"}, "activation_fn = 'topk' in the architecture 'standard'"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {}}, 'correct it to architecture = "t'),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn = 'tanh-relu' in the architecture"),
        ({"activation_fn": "relu", "activation_fn_str": "topk", **TOPK}, "its activation_fn_str"),
        ({"sae_lens_version": "6.0.0-rc.1", "architecture": "standard", "activation_fn": "topk"},
         "activation_fn = 'topk'"),
        ({"k": 8}, "the architecture None"),
        (TOPK, "the architecture None"),
        ({"sae_lens_version": "6.1.0"}, "the architecture None"),
        ({"architecture": "batchtopk"}, "the architecture 'batchtopk'"),
        ({"normalize_activations": True}, "normalize_activations = True.* = \"none\" can be read"),
        ({"normalize_activations": "expected_average_only_in"}, "SAELens' from_pretrained folds"),
        ({"normalize_activations": "constant_norm_rescale"}, "which our SAEs do not do"),
        ({"reshape_activations": "hook_z"}, "reshape_activations = 'hook_z'"),
        ({"hook_point_head_index": 3}, "hook_head_index = 3.* = null can be read"),
        ({"hook_point_layer": 3}, "hook_name in cfg.json is for layer 2 .* its hook_layer in"),
        ({"hook_point": "blocks.2.attn.hook_z"}, "as 'blocks.2.attn.hook_z', which is not known"),
        ({"hook_point": None}, "does not name the SAE's layer .*or the path of a module"),
    ],
)  # fmt: skip
def test_what_saelens_would_read_as_another_kind_is_refused(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        FORMATS["saelens"].read(old(tmp_path / "sae", "relu", **keys))


def test_a_folder_name_places_a_saelens_sae_that_its_configuration_does_not(tmp_path):
    folder = old(
        tmp_path / "blocks.3.hook_mlp_out", "relu", hook_point=None, hook_point_layer=None
    )
    assert FORMATS["saelens"].read(folder).place[:2] == (3, "mlp_out")
    edit(folder / "cfg.json", hook_name=HOOK)
    with pytest.raises(UserError, match=r"folder's name for layer 3 \(mlp_out\)"):
        FORMATS["saelens"].read(folder)


@pytest.mark.parametrize("of_cfg", [None, True])
def test_a_scaling_factor_of_ones_is_dropped(tmp_path, of_cfg):
    tensors, x = tensors_of("relu"), rows()
    folder = saelens(
        tmp_path / "sae", {**tensors, "scaling_factor": torch.ones(n)},
        finetuning_scaling_factor=of_cfg,
    )  # fmt: skip
    found = FORMATS["saelens"].read(folder)
    same_latents(found, saelens_latents("relu", tensors, x), x)


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_other_scaling_factors_multiply_latents_in_the_decoder(tmp_path, kind):
    tensors, x = tensors_of(kind), rows()
    factor = torch.linspace(0.5, 2, n)
    name = {"relu": "standard"}.get(kind, kind)
    folder = saelens(
        tmp_path / "sae", {**tensors, "scaling_factor": factor}, architecture=name, k=K,
        finetuning_scaling_factor=True,
    )  # fmt: skip
    found = FORMATS["saelens"].read(folder)
    latents = saelens_latents(kind, tensors, x)
    t = {key: tensor.double().numpy() for key, tensor in tensors.items()}
    expected = (latents * factor.numpy()) @ t["W_dec"] + t["b_dec"]
    np.testing.assert_allclose(
        found.sae.decode_dense(dense(found.sae, x)).detach().numpy(),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )
    edit(folder / "cfg.json", finetuning_scaling_factor=False)
    with pytest.raises(UserError, match="scaling_factor other than 1"):
        FORMATS["saelens"].read(folder)


def metadata(**keys):
    return {"metadata": {"sae_lens_version": "6.5.0", "hook_name": HOOK, **keys}}


@pytest.mark.parametrize(
    ("keys", "noted"),
    [
        (metadata(), None),
        (metadata(model_from_pretrained_kwargs={"center_writing_weights": False}), None),
        (metadata(context_size=128, prepend_bos=False), "context_size=128, prepend_bos=false: "),
        (metadata(model_from_pretrained_kwargs={"fold_ln": True}), '={"fold_ln": true}'),
        (metadata(model_from_pretrained_kwargs={"center_writing_weights": True}), "weights.: tr"),
        (metadata(seqpos_slice=[5, -5]), r"seqpos_slice=\[5, -5\]"),
        (metadata(exclude_special_tokens=True), "exclude_special_tokens=true"),
        ({"metadata": None, "hook_point": HOOK, "context_size": 64},
         "context_size=64, prepend_bos=true, a residual stream that TransformerLens may have c"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_one_note(tmp_path, keys, noted):
    folder = saelens(tmp_path / "sae", tensors_of("relu"), **keys)
    notes = FORMATS["saelens"].read(folder).notes
    assert len(notes) == (noted is not None)
    if noted is not None:
        assert re.search(noted, notes[0])


# ---- places -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["gpt_neox", "gpt2", "llama", "gemma2", "bloom", "falcon", "mpt", "opt", "glm4", "bert", "t5"],
)
def test_the_modules_that_are_read_are_understood(tmp_path, family):
    """In every architecture, the path of the hooked module means the place where it is."""
    config_of(family).save_pretrained(tmp_path)
    stack = {"stack": "encoder"} if family == "t5" else {}
    for hookpoint in ("resid_post", "attn_out", "mlp_out"):
        modules = frozen(tmp_path, hookpoint=hookpoint, **stack).modules
        places = [parse_module_path(f"model.{module}") for module in modules]
        assert [place[:2] for place in places] == [(i, hookpoint) for i in range(len(modules))]
        assert all(same_output(f"model.{module}", module) for module in modules)
        assert not same_output(modules[0], modules[1])


def at(hookpoint="resid_post", modules=None, **options):
    facts = facts_of(hookpoint) | options
    return ReadAt(4, d, hookpoint, facts["stack"], modules or facts["modules"])


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("layers.1", at()),
        ("gpt_neox.layers.1", at()),
        ("layers.1.mlp.dense_4h_to_h", at("mlp_out")),
        ("layers.1.mlp", at("mlp_out")),
        ("layers.1.attention", at("attn_out")),
        ("h.1.mlp", at("mlp_out", [f"h.{layer}.mlp" for layer in range(4)])),
        ("layers.1.ln", at("mlp_out", [f"layers.{layer}.ln" for layer in range(4)])),
    ],
)
def test_a_module_path_places_an_sae_of_sparsify(tmp_path, name, read):
    sparsify(tmp_path / "run" / name, tensors_of("topk"))
    (found,) = read_folder(tmp_path / "run", read)
    assert found.layers == [1]
    same_latents(found, saelens_latents("topk", tensors_of("topk"), rows()), rows())


@pytest.mark.parametrize(
    ("name", "read", "message"),
    [
        ("layers.1.mlp", at(), "hookpoint mlp_out.*model.hookpoint=mlp_out model.submodule=mlp"),
        ("layers.1", at("resid_pre"), "has hookpoint resid_post.*model.hookpoint=resid_post"),
        ("h.1", at(), "is for the output of h.1, but that of layers.1 is read.*model by model="),
        # read after a norm (Gemma 2), or with the residual stream in it (Bloom)
        ("layers.1.mlp", at("mlp_out", [f"layers.{i}.post_feedforward_layernorm" for i in "0123"]),
         "output of layers.1.mlp, .* give model.hookpoint=mlp_out model.submodule=mlp,"),
        ("h.1.mlp", at("mlp_out", [f"h.{layer}.mlp.dense_4h_to_h" for layer in range(4)]),
         "that of h.1.mlp.dense_4h_to_h is read"),
        ("layers.1.attention.query", at("attn_out"), "model.submodule=attention.query"),
        ("encoder.block.1", at(modules=[f"decoder.block.{i}" for i in "0123"]), "decoder.block.1"),
        ("embed_tokens", at(), "or to the path of its module"),
        ("seed1", at(), "give the folder above it"),
    ],
)  # fmt: skip
def test_an_output_that_is_not_read_is_refused_with_the_options(tmp_path, name, read, message):
    folder = sparsify(tmp_path / name, tensors_of("topk"))
    with pytest.raises(UserError, match=message):
        read_folder(folder, read)


def test_sparsify_chose_by_magnitude_before_version_1(tmp_path):
    folder = sparsify(tmp_path / "layers.1", tensors_of("topk"), signed=True)
    with pytest.raises(UserError, match="signed = True.*with signed = false can be read"):
        read_folder(folder, at())


def test_sae_of_the_paper_on_another_module_has_its_own_factor(tmp_path):
    folder = sparsify(tmp_path / "layers.3.mlp", tensors_of("topk"))
    factors = {"gpt_neox.layers.3.mlp": 0.25, "gpt_neox.layers.3": 4.0}
    torch.save(factors, folder / "scaling_factors.pt")
    (found,) = read_folder(folder, at("mlp_out"))
    assert (found.format, found.norm_factors) == ("group-sae", {3: 0.25})
    with pytest.raises(UserError, match="hookpoint mlp_out, but .* hookpoint resid_post"):
        read_folder(folder, at())


def test_a_checkpoint_of_the_paper_is_what_its_configuration_says(tmp_path):
    x, factor = rows(), {"layers.1": 0.5}
    for name, kind, keys in (
        ("topk", "topk", {"k": K}),
        ("relu", "relu", {"k": 0}),
        ("jumprelu", "jumprelu", {"k": 0, "jumprelu": True}),
    ):
        tensors = tensors_of(kind)
        stored = {key: t for key, t in tensors.items() if key != "threshold"}
        more = {"log_threshold": tensors["threshold"].log()} if kind == "jumprelu" else {}
        folder = sparsify(tmp_path / name / "layers.1", stored | more, **keys)
        torch.save(factor, folder / "scaling_factors.pt")
        (found,) = read_folder(folder, at())
        assert (found.format, found.norm_factors) == ("group-sae", {1: 0.5})
        same_latents(found, saelens_latents(kind, tensors, x), x)
    edit(folder / "cfg.json", activation="groupmax")
    with pytest.raises(UserError, match="activation = 'groupmax'"):
        read_folder(folder, at())


def test_without_k_it_is_the_default_of_the_library(tmp_path):
    folder = sparsify(tmp_path / "layers.1", tensors_of("topk"))
    edit(folder / "cfg.json", k=None)
    assert FORMATS["sparsify"].read(folder).sae.k == 32
    torch.save({"layers.1": 0.5}, folder / "scaling_factors.pt")
    (found,) = read_folder(folder, at())
    assert (found.format, found.sae.k) == ("group-sae", 32)


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_of_ours_keeps_its_module(tmp_path, form):
    suite = load_suite(run_folder(tmp_path / "run", "topk", hookpoint="mlp_out"))
    export_suite(suite, FORMATS[form], tmp_path / "out", overwrite=False)
    assert len(read_folder(tmp_path / "out", at("mlp_out"))) == 3
    normed = [f"layers.{layer}.post_feedforward_layernorm" for layer in range(4)]
    with pytest.raises(UserError, match="model.hookpoint=mlp_out model.submodule=mlp.dense_4h"):
        read_folder(tmp_path / "out", at("mlp_out", normed))


def relu_state():
    t = tensors_of("relu")
    weights = {"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "bias": t["b_dec"]}
    return {**weights, "decoder.weight": t["W_dec"].T.contiguous()}


@pytest.mark.parametrize(
    ("name", "layer", "place"),
    [
        ("resid_post_layer_3", 3, (3, "resid_post")),
        ("resid_out_layer3", None, (3, "resid_post")),
        ("resid_pre_layer_3", 3, (3, "resid_pre")),
        ("mlp_out_layer1", 1, (1, "mlp_out")),
        ("mlp1", None, (1, "mlp_out")),
        ("mlp", 2, (2, "mlp_out")),
        ("attn_out_layer0", 0, (0, "attn_out")),
        ("attention_layer_2", 2, (2, "attn_out")),
        ("attention_out_layer_2", None, (2, "attn_out")),
        ("layer_3_resid_post", None, (3, "resid_post")),
        ("pythia_resid_post_layer_3_v2", 3, (3, "resid_post")),
        ("transformer.h.1.attn", 1, (1, "attn_out")),
        ("gpt_neox.layers[2]", 2, (2, "resid_post")),
    ],
)
def test_places_of_dictionary_learning(tmp_path, name, layer, place):
    folder = dictionary(
        tmp_path / "sae", "AutoEncoder", relu_state(), submodule_name=name, layer=layer
    )
    found = FORMATS["dictionary_learning"].read(folder)
    assert found.place[:2] == place
    assert found.notes == []
    same_latents(found, saelens_latents("relu", tensors_of("relu"), rows()), rows())


@pytest.mark.parametrize("name", ["embed", "resid_mid_layer_3", "pre_mlp_layer_3", "unknown", "3"])
def test_an_unknown_place_is_not_guessed(tmp_path, name):
    folder = dictionary(tmp_path / "sae", "AutoEncoder", relu_state(), submodule_name=name)
    with pytest.raises(UserError, match=f"as '{name}', which is not known: correct submod"):
        FORMATS["dictionary_learning"].read(folder)
    folder = folder.rename(tmp_path / "mlp_out_layer_4")  # the way out
    found = FORMATS["dictionary_learning"].read(folder)
    assert found.place[:2] == (4, "mlp_out")
    assert found.notes == [
        f"its submodule_name {name!r} is not known: the name of its folder decides"
    ]


def test_the_configuration_decides_and_contradictions_are_named(tmp_path):
    above = tmp_path / "resid_post_layer_9"  # not below the path that is given
    folder = dictionary(
        above / "run" / "trainer_0", "AutoEncoder", relu_state(), submodule_name="mlp_out_layer_4"
    )
    for path in (above, above / "run"):
        (found,) = read_folder(path, ReadAt(12, d, "mlp_out", "decoder"))
        assert found.layers == [4]
    with pytest.raises(UserError, match=r"for layer 4 \(mlp_out\), and its folder's name resid"):
        read_folder(tmp_path, ReadAt(12, d, "mlp_out", "decoder"))
    config = {"dict_class": "AutoEncoder", "submodule_name": "mlp_out_layer_4", "layer": 5}
    edit(folder / "config.json", trainer=config)
    with pytest.raises(UserError, match=r"\(mlp_out\), and its layer in config.json for layer 5"):
        read_folder(folder, ReadAt(12, d, "mlp_out", "decoder"))


def test_a_layer_without_a_submodule_is_read_where_the_model_is(tmp_path):
    folder = dictionary(tmp_path / "sae", "AutoEncoder", relu_state())
    for hookpoint in ("resid_post", "mlp_out"):
        (found,) = read_folder(folder, ReadAt(12, d, hookpoint, "decoder"))
        assert found.layers == [4]
        assert "names layer 4 and no submodule: model.hookpoint decides" in found.notes[0]


def test_inputs_of_modules_are_refused(tmp_path):
    folder = dictionary(tmp_path / "s", "AutoEncoder", relu_state(), submodule_name="mlp4")
    edit(folder / "config.json", buffer={"io": "in"})
    with pytest.raises(UserError, match="io = 'in', and our SAEs encode outputs"):
        FORMATS["dictionary_learning"].read(folder)


def test_two_values_of_k_are_a_contradiction(tmp_path):
    t = tensors_of("topk")
    state = {"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "b_dec": t["b_dec"],
             "decoder.weight": t["W_dec"].T.contiguous(), "k": torch.tensor(K)}  # fmt: skip
    folder = dictionary(tmp_path / "s", "AutoEncoderTopK", state, k=K + 1)
    with pytest.raises(UserError, match="k is 6 in config.json and 5 in ae.pt"):
        FORMATS["dictionary_learning"].read(folder)


def test_names_of_places():
    assert parse_name("L5_mlp")[:2] == (5, "mlp_out")
    assert parse_name("mlp") is None
    assert parse_name("trainer_0") is None
