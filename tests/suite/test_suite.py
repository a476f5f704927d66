"""A saved suite encodes and decodes as the modules it was trained as, without Lightning."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from groupsae import load_suite
from groupsae.grouping.choices import All
from groupsae.grouping.groupings import groupings
from groupsae.runtime.errors import UserError
from groupsae.sae.topk import TopK
from groupsae.suite.groups_file import load_plan
from groupsae.suite.suite import Suite, load_saes, save_sae
from groupsae.training.group import GroupSAE
from groupsae.training.optim import Adam

D_MODEL, D_SAE, K = 8, 32, 4
ARGUMENTS = {"expansion": 4, "k": K}
GROUPS = {"layers.0-1": [0, 1], "layers.2": [2], "layers.4-5": [4, 5]}
NORMS = {layer: 0.1 * 1.7**layer for layer in range(6)}


def trained_group(name, layers):
    """Return a group as training leaves it: untied weights, biases, unit decoder."""
    group = GroupSAE(
        name=name, layers=layers, norm_factors=NORMS, d_model=D_MODEL, dead_after=100,
        b_dec_start="zero", nonfinite="stop", seed=0,
        sae=lambda **kwargs: TopK(**ARGUMENTS, **kwargs),
        optim=Adam(base_lr=1e-3, base_d_sae=32),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(layers[0])
    with torch.no_grad():
        for parameter in group.sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    group.sae.normalize_decoder()
    return group


@pytest.fixture
def groups():
    return {name: trained_group(name, layers) for name, layers in GROUPS.items()}


@pytest.fixture
def run_folder(groups, tmp_path):
    for name, group in groups.items():
        factors = {layer: float(group.norm_factors[layer]) for layer in group.layers}
        save_sae(tmp_path / "saes" / name, group.sae, {
            "architecture": "groupsae.sae.topk.TopK",
            "arguments": {"d_model": D_MODEL, **ARGUMENTS},
            "layers": group.layers, "norm_factors": factors,
        })  # fmt: skip
    return tmp_path


def edit(folder, group="layers.2", **changes):
    file = folder / "saes" / group / "cfg.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def activations(rows=50):
    return 5 * torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("layer", [0, 1, 2, 4, 5])
def test_a_loaded_suite_encodes_and_decodes_as_the_trained_modules(run_folder, groups, layer):
    suite, x = load_suite(run_folder), activations()
    group = groups[suite.group_of(layer)]
    x_hat, latents = group.reconstruct(x, layer)
    dense = torch.zeros(len(x), D_SAE).scatter(1, latents.indices, latents.acts)
    assert torch.equal(suite.encode(x, layer), dense.detach())
    # the dense product adds in another order than the sparse one
    torch.testing.assert_close(suite.decode(dense, layer), x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(suite.reconstruct(x, layer), x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 3), (0,)])
def test_leading_dimensions_are_kept(run_folder, shape):
    suite = load_suite(run_folder)
    x = torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(0))
    latents = suite.encode(x, layer=2)
    assert latents.shape == (*shape, D_SAE)
    assert suite.decode(latents, layer=2).shape == x.shape
    flat = suite.encode(x.reshape(-1, D_MODEL), layer=2)
    assert torch.equal(latents.reshape(-1, D_SAE), flat)
    assert ((latents > 0).sum(-1) <= K).all()


def test_each_layer_has_its_own_norm_factor_on_the_way_in_and_out(run_folder, groups):
    suite, x = load_suite(run_folder), activations()
    assert all(suite.norm_factor(layer) == pytest.approx(NORMS[layer]) for layer in suite.layers)
    # The same SAE at two layers: equal after scaling means equal latents, and the
    # reconstructions differ by the quotient of the factors.
    scaled = x * (NORMS[4] / NORMS[5])
    here, there = suite.encode(x, layer=4), suite.encode(scaled, layer=5)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(here, suite.encode(x, layer=5), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        suite.decode(here, layer=4) * NORMS[4], suite.decode(here, layer=5) * NORMS[5]
    )
    by_hand = groups["layers.4-5"].sae.pre_acts(x * NORMS[4]).relu().topk(K).values
    torch.testing.assert_close(here.topk(K).values, by_hand.detach(), rtol=1e-5, atol=1e-6)


def test_the_suite_knows_which_group_a_layer_belongs_to(run_folder):
    suite = load_suite(run_folder)
    assert suite.layers == [0, 1, 2, 4, 5]
    assert [suite.group_of(layer) for layer in (0, 1, 2, 4, 5)] == [
        "layers.0-1", "layers.0-1", "layers.2", "layers.4-5", "layers.4-5",
    ]  # fmt: skip


@pytest.mark.parametrize("use", ["group_of", "norm_factor", "encode", "decode"])
def test_a_layer_without_an_sae_is_refused_with_those_that_have_one(run_folder, use):
    suite = load_suite(run_folder)
    first = {"encode": [activations()], "decode": [torch.zeros(1, D_SAE)]}.get(use, [])
    with pytest.raises(UserError, match=r"no SAE for layer 3.*\[0, 1, 2, 4, 5\]"):
        getattr(suite, use)(*first, layer=3)


def test_the_saes_folder_itself_can_be_loaded_and_paths_can_be_strings(run_folder):
    x = activations()
    expected = load_suite(run_folder).encode(x, layer=0)
    assert torch.equal(load_suite(str(run_folder / "saes")).encode(x, layer=0), expected)


def test_half_precision_activations_are_encoded_in_the_saes_precision(run_folder):
    suite, x = load_suite(run_folder), activations().bfloat16()
    latents = suite.encode(x, layer=2)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, suite.encode(x.float(), layer=2))


def test_activations_of_another_width_are_refused_with_both(run_folder):
    suite = load_suite(run_folder)
    sentence = rf"layer 5 have the shape \[3, {D_MODEL + 1}\], and its SAE takes .* {D_MODEL}\]"
    for use in (suite.encode, suite.encode_sparse, suite.reconstruct):
        with pytest.raises(UserError, match=sentence):
            use(torch.ones(3, D_MODEL + 1), layer=5)
    with pytest.raises(UserError, match=rf"latents of layer 5 have .*takes .* {D_SAE}\]"):
        suite.decode(torch.zeros(2, 3), 5)


def test_encoding_builds_no_graph(run_folder):
    suite = load_suite(run_folder)
    assert not suite.reconstruct(activations().requires_grad_(), layer=2).requires_grad


def test_a_folder_without_saes_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="expected saes/<group>/cfg.json"):
        load_suite(tmp_path)
    with pytest.raises(UserError, match=r"no SAEs under .*/nowhere"):
        load_suite(tmp_path / "nowhere")


def test_truncated_or_missing_weights_are_damage(run_folder):
    weights = run_folder / "saes" / "layers.2" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"layers\.2 is damaged"):
        load_suite(run_folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"layers\.2 is damaged"):
        load_suite(run_folder)


def test_weights_of_another_shape_or_with_a_tensor_missing_are_damage(run_folder):
    weights = run_folder / "saes" / "layers.2" / "sae.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "b_enc": torch.zeros(5)}, weights)
    with pytest.raises(UserError, match=r"layers\.2 is damaged"):
        load_suite(run_folder)
    save_file({k: v for k, v in tensors.items() if k != "b_enc"}, weights)
    with pytest.raises(UserError, match=r"layers\.2 is damaged"):
        load_suite(run_folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}'])
def test_a_config_that_is_not_one_is_damage(run_folder, text):
    (run_folder / "saes" / "layers.2" / "cfg.json").write_text(text)
    with pytest.raises(UserError, match=r"layers\.2.*damaged"):
        load_suite(run_folder)


@pytest.mark.parametrize("key", ["architecture", "arguments", "layers", "norm_factors"])
def test_a_config_without_a_needed_key_is_damage(run_folder, key):
    edit(run_folder, **{key: None})
    with pytest.raises(UserError, match=rf"layers\.2.*damaged.*{key}"):
        load_suite(run_folder)


def test_arguments_that_the_class_does_not_take_are_damage(run_folder):
    edit(run_folder, arguments={"d_model": 8, "wings": 2})
    with pytest.raises(UserError, match=r"layers\.2.*damaged"):
        load_suite(run_folder)


def test_a_norm_factor_missing_for_a_layer_is_found_on_loading(run_folder):
    edit(run_folder, norm_factors={"1": 0.5})
    with pytest.raises(UserError, match=r"layers\.2.*damaged"):
        load_suite(run_folder)


@pytest.mark.parametrize("name", [
    "os.system", "subprocess.Popen", "groupsae.suite.suite.save_sae", "TopK", "",
    "groupsae.sae.topk.nn", "groupsae.sae.topk.Tensor", "groupsae.sae.topk.TopJ",
    "groupsae.sae.base.SAEOutput", "groupsae.sae.nowhere.TopK", "groupsae.sae..TopK",
    "groupsae.sae.topk.nn.Linear", "groupsae.saeevil.TopK",
])  # fmt: skip
def test_a_class_that_is_no_sae_of_ours_is_refused(run_folder, name):
    edit(run_folder, architecture=name)
    with pytest.raises(UserError, match="not one of groupsae.sae"):
        load_suite(run_folder)


def test_only_arguments_of_training_may_be_missing(run_folder):
    """An older version wrote no `selection`; without `k` the latents would be others."""
    expected = load_suite(run_folder).encode(activations(), layer=2)
    arguments = {"d_model": D_MODEL, **ARGUMENTS}
    edit(run_folder, arguments=arguments | {"selection": "float32", "auxk_alpha": 0.5})
    assert torch.equal(load_suite(run_folder).encode(activations(), layer=2), expected)
    del arguments["k"]
    edit(run_folder, arguments=arguments)
    with pytest.raises(UserError, match="damaged"):
        load_suite(run_folder)


def test_a_format_of_the_future_is_refused(run_folder):
    edit(run_folder, format=99)
    with pytest.raises(UserError, match="format 99"):
        load_suite(run_folder)


def test_saving_again_replaces_and_leaves_no_partial_file(run_folder, groups):
    group = groups["layers.2"]
    save_sae(run_folder / "saes" / "layers.2", group.sae, {"architecture": "x", "layers": [2]})
    folder = run_folder / "saes" / "layers.2"
    assert sorted(f.name for f in folder.iterdir()) == ["cfg.json", "sae.safetensors"]


def test_loading_needs_neither_lightning_nor_the_training_stack(run_folder):
    code = f"""
import sys
for name in ("lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb", "datasets",
             "transformers", "torchmetrics"):
    sys.modules[name] = None   # importing it raises ImportError
import groupsae, torch
suite = groupsae.load_suite({str(run_folder)!r})
print(suite.encode(torch.ones(3, {D_MODEL}), layer=5).shape[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(D_SAE)


# ---- a run with several groupings -----------------------------------------------------------


PLACES = [0.0, 0.1, 0.12, 0.3, 0.31, 0.9]


@pytest.fixture
def all_folder(tmp_path):
    """Return a run folder with the SAEs of all groupings of six layers."""
    choice = All(rules=["complete", "even"], theta=0.2, smaller=[2], last_layer="own")
    plan = choice.plan(np.abs(np.subtract.outer(PLACES, PLACES)))
    for number, planned in enumerate(plan.members):
        arguments = {"d_model": D_MODEL, **ARGUMENTS, "expansion": 4 * planned.width}
        sae = TopK(**arguments, generator=torch.Generator().manual_seed(number))
        save_sae(tmp_path / "saes" / planned.name, sae, {
            "architecture": "groupsae.sae.topk.TopK", "arguments": arguments,
            "layers": planned.layers, "norm_factors": {x: NORMS[x] for x in planned.layers},
        })  # fmt: skip
    (tmp_path / "groups.json").write_text(json.dumps({"plan": plan.to_json()}))
    return tmp_path


def owners(suite):
    return {layer: suite.group_of(layer) for layer in suite.layers}


def test_every_grouping_of_a_run_can_be_loaded(all_folder):
    found = groupings(load_plan(all_folder))
    assert {each.kind for each in found} == {"groups", "per_layer", "smaller"}
    for each in found:
        suite = load_suite(all_folder, grouping=each.name)
        assert owners(suite) == each.sae_of_layer
        assert set(suite.saes) == set(each.sae_of_layer.values())
    smaller = load_suite(all_folder, grouping="smaller-2")
    assert [smaller.saes[f"layers.{x}.smaller-2"].d_sae for x in range(5)] == [13] * 5
    assert smaller.saes["layers.5"].d_sae == D_SAE
    assert smaller.encode(activations(), layer=0).shape == (50, 13)


def test_a_grouping_goes_by_the_name_of_every_rule_that_made_it(all_folder):
    shared = [each for each in groupings(load_plan(all_folder)) if len(each.rules) > 1]
    assert {each.num_groups for each in shared} > {1, 5}  # some that is neither end
    for each in shared:
        for rule in each.rules:
            suite = load_suite(all_folder, grouping=f"{rule}-{each.num_groups}")
            assert owners(suite) == each.sae_of_layer


def test_the_default_is_the_grouping_that_amad_chose(all_folder):
    chosen = {0: "layers.0-2", 1: "layers.0-2", 2: "layers.0-2", 3: "layers.3-4", 4: "layers.3-4"}
    for path in (all_folder, str(all_folder), all_folder / "saes"):
        assert owners(load_suite(path)) == chosen | {5: "layers.5"}


def test_an_unknown_grouping_is_refused_with_those_there_are(all_folder):
    with pytest.raises(UserError, match="no grouping 'minmax-2'") as error:
        load_suite(all_folder, grouping="minmax-2")
    for each in groupings(load_plan(all_folder)):
        assert each.name in str(error.value)
    with pytest.raises(UserError, match="no grouping ''"):
        load_suite(all_folder, grouping="")


def test_saes_without_their_plan_belong_to_one_grouping(all_folder):
    (all_folder / "groups.json").unlink()
    with pytest.raises(UserError, match=r"has no groups\.json"):
        load_suite(all_folder, grouping="per_layer")
    with pytest.raises(UserError, match="layer 0 has two SAEs"):
        load_suite(all_folder)


def test_saes_that_share_a_layer_are_no_suite(all_folder):
    with pytest.raises(UserError, match="has at least one SAE"):
        Suite({}, {})
    assert load_saes(all_folder / "saes", ["layers.0-2", "layers.3"]).layers == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"layer 1 has two SAEs, layers\.0-2 and layers\.1:"):
        load_saes(all_folder / "saes", ["layers.0-2", "layers.1"])


def test_a_missing_sae_of_a_grouping_is_damage_of_that_grouping_only(all_folder):
    (all_folder / "saes" / "layers.1" / "sae.safetensors").unlink()
    assert load_suite(all_folder).layers == list(range(6))
    with pytest.raises(UserError, match=r"layers\.1 is damaged"):
        load_suite(all_folder, grouping="per_layer")
