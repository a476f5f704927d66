"""What an export writes: pinned here without the libraries it is for, and proved by reading back.

`test_foreign_libraries.py` loads the same folders with the libraries themselves.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from groupsae.config.instantiate import CONF
from groupsae.export import export as command
from groupsae.interop.formats import FORMATS, check_holds
from groupsae.interop.library import build, fold_norm_factor, parse_module_path
from groupsae.interop.saelens import lens_model
from groupsae.runtime.errors import UserError
from groupsae.suite.exporting import compare, export_suite
from groupsae.suite.suite import load_suite
from tests.helpers.evaluated import evaluated
from tests.helpers.shelf import (
    D_MODEL,
    D_SAE,
    FACTORS,
    KINDS,
    K,
    edit,
    naive,
    rows,
    run_folder,
    tensors_of,
)

n, d = D_SAE, D_MODEL
FOUR = {"W_enc": [d, n], "b_enc": [n], "W_dec": [n, d], "b_dec": [d]}
LENS_TENSORS = {
    "topk": ("topk", FOUR),
    "relu": ("standard", FOUR),
    "jumprelu": ("jumprelu", FOUR | {"threshold": [n]}),
    "batchtopk": ("jumprelu", FOUR | {"threshold": [n]}),
    "matryoshka": ("jumprelu", FOUR | {"threshold": [n]}),
    "gated": (
        "gated",
        {"W_enc": [d, n], "W_dec": [n, d], "b_dec": [d]}
        | {name: [n] for name in ("b_gate", "b_mag", "r_mag")},
    ),
}
LINEAR = {"encoder.weight": [n, d], "encoder.bias": [n], "decoder.weight": [d, n]}
DICTIONARIES = {
    "topk": ("AutoEncoderTopK", LINEAR | {"b_dec": [d], "k": [], "threshold": []}),
    "batchtopk": ("BatchTopKSAE", LINEAR | {"b_dec": [d], "k": [], "threshold": []}),
    "matryoshka": (
        "MatryoshkaBatchTopKSAE",
        FOUR | {"k": [], "threshold": [], "group_sizes": [3]},
    ),
    "jumprelu": ("JumpReluAutoEncoder", FOUR | {"threshold": [n]}),
    "relu": ("AutoEncoder", LINEAR | {"bias": [d]}),
    "gated": (
        "GatedAutoEncoder",
        {"encoder.weight": [n, d], "decoder.weight": [d, n], "decoder_bias": [d]}
        | {name: [n] for name in ("r_mag", "gate_bias", "mag_bias")},
    ),
}
ABLE = [(f, k) for f in FORMATS for k in KINDS if k in FORMATS[f].kinds]


def exported(tmp_path: Path, kind: str, form: str, **more) -> Path:
    run = run_folder(tmp_path / "run", kind, **more)
    export_suite(load_suite(run), FORMATS[form], tmp_path / "out", overwrite=False)
    return tmp_path / "out"


def export(run: Path | str, *arguments: str) -> None:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        command(compose("export", [f"run={run}", *arguments]))


def shapes(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saelens_folder_has_these_names_shapes_and_keys(tmp_path, kind):
    out = exported(tmp_path, kind, "saelens")
    assert sorted(p.name for p in out.iterdir()) == [
        f"blocks.{layer}.hook_resid_post" for layer in (0, 1, 3)
    ]
    folder = out / "blocks.1.hook_resid_post"
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    architecture, wanted = LENS_TENSORS[kind]
    tensors = load_file(folder / "sae_weights.safetensors")
    assert shapes(tensors) == wanted
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    config = json.loads((folder / "cfg.json").read_text())
    metadata = config.pop("metadata")
    topk = {"k": K, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}
    assert config == {
        "architecture": architecture, "d_in": d, "d_sae": n, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", **topk,
    }  # fmt: skip
    ours = metadata.pop("groupsae")
    assert metadata == {
        "sae_lens_version": "6.54.12", "sae_lens_training_version": None,
        "model_name": "pythia-14m", "hook_name": "blocks.1.hook_resid_post",
        "hook_head_index": None, "context_size": 64, "prepend_bos": False,
    }  # fmt: skip
    assert ours["group"] == "layers.0-1"
    assert ours["layers"] == [0, 1]
    assert ours["layer"] == 1
    assert ours["norm_factor"] == FACTORS[1]
    assert ours["model"] == "EleutherAI/pythia-14m"
    assert ours["revision"] == "step1000"
    assert ours["hookpoint"] == "resid_post"


def test_a_sparsify_folder_has_these_names_shapes_and_keys(tmp_path):
    out = exported(tmp_path, "topk", "sparsify")
    assert sorted(p.name for p in out.iterdir()) == ["layers.0", "layers.1", "layers.3"]
    folder = out / "layers.3"
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae.safetensors"]
    tensors = load_file(folder / "sae.safetensors")
    assert shapes(tensors) == {
        "encoder.weight": [n, d], "encoder.bias": [n], "W_dec": [n, d], "b_dec": [d],
    }  # fmt: skip
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    config = json.loads((folder / "cfg.json").read_text())
    assert config.pop("groupsae")["norm_factor"] == FACTORS[3]
    assert config == {
        "activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": n,
        "k": K, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_learning_folder_has_these_names_shapes_and_keys(tmp_path, kind):
    out = exported(tmp_path, kind, "dictionary_learning")
    assert sorted(p.name for p in out.iterdir()) == [f"resid_post_layer_{x}" for x in (0, 1, 3)]
    folder = out / "resid_post_layer_0"
    assert sorted(p.name for p in folder.iterdir()) == ["ae.pt", "config.json"]
    name, wanted = DICTIONARIES[kind]
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    assert shapes(tensors) == wanted
    whole = {"k": torch.int32, "group_sizes": torch.int64}
    for key, tensor in tensors.items():
        assert tensor.dtype == whole.get(key, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    trainer = config["trainer"]
    assert trainer["dict_class"] == name
    assert (trainer["activation_dim"], trainer["dict_size"]) == (d, n)
    assert trainer["layer"] == 0
    assert trainer["lm_name"] == "EleutherAI/pythia-14m"
    assert trainer["submodule_name"] == "resid_post_layer_0"
    assert trainer["trainer_class"].endswith("Trainer")
    assert config["buffer"]["ctx_len"] == 64
    if kind in ("topk", "batchtopk", "matryoshka"):
        assert trainer["k"] == int(tensors["k"]) == K
    if kind == "topk":
        assert float(tensors["threshold"]) == -1
    if kind == "matryoshka":
        assert tensors["group_sizes"].tolist() == [12, 12, 24]


@pytest.mark.parametrize(("form", "kind"), ABLE)
def test_saes_read_back_compute_the_definition_on_raw_activations(tmp_path, form, kind):
    out = exported(tmp_path, kind, form)
    for layer, seed in ((0, 0), (1, 0), (3, 1)):
        name = {
            "saelens": f"blocks.{layer}.hook_resid_post",
            "sparsify": f"layers.{layer}",
            "dictionary_learning": f"resid_post_layer_{layer}",
        }[form]
        found = FORMATS[form].read(out / name)
        assert (found.layers, found.place.hookpoint) == ([layer], "resid_post")
        factor, x = FACTORS[layer], rows()
        acts, x_hat = naive(kind, tensors_of(kind, seed), x * factor)
        assert (acts > 0).any()
        latents = found.sae.encode(x)
        dense = torch.zeros(len(x), D_SAE).scatter(1, latents.indices, latents.acts)
        torch.testing.assert_close(dense.double(), acts / factor, rtol=1e-4, atol=1e-5)
        decoded = found.sae.decode(latents).double()
        torch.testing.assert_close(decoded, x_hat / factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "kind"), ABLE)
def test_layers_with_something_of_their_own_are_exported_as_they_are(tmp_path, form, kind):
    """Every folder has other weights, those of its layer in the suite."""
    own = {"layer_bias": "per_layer", "layer_rank": 3}
    out, x = exported(tmp_path, kind, form, own=own), rows(seed=3)
    suite = load_suite(tmp_path / "run")
    assert "own biases, rank 3" in repr(suite)
    encoders = []
    for layer in (0, 1, 3):
        name = {
            "saelens": f"blocks.{layer}.hook_resid_post",
            "sparsify": f"layers.{layer}",
            "dictionary_learning": f"resid_post_layer_{layer}",
        }[form]
        found = FORMATS[form].read(out / name).sae
        latents = found.encode(x)
        expected = suite.encode_sparse(x, layer)
        dense, ours = (  # times the norm of the decoder's row, which reading may fold into them
            torch.zeros(len(x), D_SAE).scatter(1, each.indices, each.acts) * decoder.norm(dim=1)
            for each, decoder in ((latents, found.W_dec), (expected, suite[layer].W_dec))
        )
        torch.testing.assert_close(dense, ours / FACTORS[layer], rtol=1e-4, atol=1e-4)
        x_hat = suite.decode_sparse(expected, layer)
        torch.testing.assert_close(found.decode(latents), x_hat, rtol=1e-4, atol=1e-4)
        encoders.append(found.W_enc)
    assert not torch.allclose(encoders[0], encoders[1], atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fold_leaves_the_weights_and_divides_the_latents(kind):
    from tests.helpers.shelf import dense, more_of

    sae = build(kind, tensors_of(kind), **more_of(kind))
    folded, x = fold_norm_factor(sae, 0.37), rows()
    assert torch.equal(folded.W_enc, sae.W_enc)
    assert torch.equal(folded.W_dec, sae.W_dec)
    torch.testing.assert_close(dense(folded, x) * 0.37, dense(sae, x * 0.37), rtol=1e-4, atol=1e-5)


def test_a_wrong_fold_would_be_found(tmp_path, monkeypatch):
    """The comparison after writing finds errors."""
    from groupsae.suite import exporting

    run = run_folder(tmp_path / "run", "jumprelu")
    monkeypatch.setattr(exporting, "fold_norm_factor", lambda sae, _factor: sae)
    with pytest.raises(UserError, match="would not compute the same as layers.0-1"):
        export_suite(load_suite(run), FORMATS["saelens"], tmp_path / "out", overwrite=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_inactive_saes_are_never_called_the_same():

    def made(seed, threshold):
        tensors = tensors_of("jumprelu", seed)
        return build("jumprelu", tensors | {"threshold": torch.full((n,), threshold)})

    assert compare(made(0, 1e6), 1.0, made(0, 1e6))[0] < 1e-12
    assert compare(made(0, 1e6), 1.0, made(1, 1e6))[0] > 0.1
    with pytest.raises(UserError, match="stays inactive on test activations"):
        compare(made(0, 1e30), 1.0, made(1, 1e30))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "topk"])
def test_what_a_format_cannot_hold_is_refused_with_those_that_can(tmp_path, kind):
    run = run_folder(tmp_path / "run", kind)
    with pytest.raises(UserError, match=f"a {kind} SAE.*format=saelens or .*dictionary_learning"):
        export(run, "format=sparsify")
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=gguf"], "'gguf': use saelens, sparsify, dictionary_learning"),
        ([], "nothing to do: give format="),
        (["hub=me/saes", "output=out"], "output=out is where format=... writes"),
        (["format=saelens", "hub=no/good/name"], "write owner/name"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        export(run_folder(tmp_path / "run", "topk"), *arguments)


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    run = run_folder(tmp_path / "run", "topk")
    (run / "summary.json").unlink()
    (run / ".hydra").mkdir()
    (run / ".hydra" / "config.yaml").write_text("overwrite: false\nrun_format: 3\n")
    with pytest.raises(UserError, match="was not finished"):
        export(run, "format=saelens")
    with pytest.raises(UserError, match="no run there"):
        export(tmp_path / "elsewhere", "format=saelens")


def test_the_command_shows_every_folder_with_its_difference(tmp_path, capsys):
    run = run_folder(tmp_path / "run", "topk")
    export(run, "format=dictionary_learning")
    message = capsys.readouterr().out
    for layer in (0, 1, 3):
        assert f"resid_post_layer_{layer}" in message
    assert "e-0" in message
    assert (run / "export" / "dictionary_learning" / "resid_post_layer_3" / "ae.pt").exists()
    with pytest.raises(UserError, match="exists: overwrite=true"):
        export(run, "format=dictionary_learning")
    export(run, "format=dictionary_learning", "overwrite=true")
    assert sorted(p.name for p in (run / "export").iterdir()) == ["dictionary_learning"]


def test_an_export_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch):
    out = exported(tmp_path, "topk", "saelens")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    real = FORMATS["saelens"].write

    def full(folder, sae, about):
        if about.layer == 3:
            raise OSError(28, "No space left on device")
        real(folder, sae, about)

    broken = type(FORMATS["saelens"])(**{**vars(FORMATS["saelens"]), "write": full})
    with pytest.raises(UserError, match="No space left on device"):
        export_suite(load_suite(tmp_path / "run"), broken, out, overwrite=True)
    with pytest.raises(UserError, match="No space left on device"):
        export_suite(load_suite(tmp_path / "run"), broken, tmp_path / "a" / "b", overwrite=False)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("output", ["run", "run/saes", ".", "mine", "run/../run"])
def test_overwriting_replaces_nothing_but_an_export(tmp_path, monkeypatch, output):
    run_folder(tmp_path / "run", "topk")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not replace"):
        export("run", "format=saelens", "overwrite=true", f"output={output}")
    with pytest.raises(UserError, match="not replace"):
        export_suite(load_suite("run"), FORMATS["saelens"], Path(output), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("hookpoint", "lens", "module", "dictionary"),
    [
        ("resid_pre", "blocks.1.hook_resid_pre", "layers.0", "resid_pre_layer_1"),
        ("mlp_out", "blocks.1.hook_mlp_out", "layers.1.mlp.dense_4h_to_h", "mlp_out_layer_1"),
        ("attn_out", "blocks.1.hook_attn_out", "layers.1.attention", "attn_out_layer_1"),
    ],
)
def test_other_hookpoints_go_by_each_librarys_name(tmp_path, hookpoint, lens, module, dictionary):
    for form, name in zip(FORMATS, (lens, module, dictionary), strict=True):
        run = run_folder(tmp_path / form / "run", "topk", hookpoint=hookpoint)
        suite, out = load_suite(run), tmp_path / form / "out"
        if (form, hookpoint) == ("sparsify", "resid_pre"):
            with pytest.raises(UserError, match="resid_pre of layer 0"):
                export_suite(suite, FORMATS[form], out, overwrite=False)
            assert not out.exists()
            continue
        export_suite(suite, FORMATS[form], out, overwrite=False)
        found = FORMATS[form].read(out / name)
        assert (found.layers, found.place.hookpoint) == ([1], hookpoint)


def test_a_run_that_does_not_name_its_modules_is_not_guessed_about(tmp_path):
    run = run_folder(tmp_path / "run", "topk", modules=None)
    with pytest.raises(UserError, match="does not name the module of layer 0.*format=saelens"):
        export(run, "format=sparsify")


def test_models_and_modules_go_by_their_librarys_names():
    assert lens_model("EleutherAI/pythia-160m") == "pythia-160m"
    assert lens_model("openai-community/gpt2") == "gpt2"
    assert lens_model("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert lens_model("/some/where/model") == "model"
    assert parse_module_path("encoder.block.3")[:2] == (3, "resid_post")
    assert parse_module_path("h.11.attn")[:2] == (11, "attn_out")
    assert parse_module_path("layers.3.mlp.up_proj")[:2] == (3, "mlp_out")
    assert parse_module_path("layers.3.input_layernorm")[:2] == (3, None)
    assert parse_module_path("embed_tokens") is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "sae.safetensors is damaged"),
        ("shape", r"the tensor W_dec has shape \[48, 15\].*requires \[48, 16\]"),
        ("missing", "lacks the tensor b_enc"),
        ("newer", "has format 99, and this version of groupsae reads format 2"),
    ],
)
def test_damaged_saes_of_ours_are_named_and_nothing_is_written(tmp_path, damage, message):
    run = run_folder(tmp_path / "run", "topk")
    file = run / "saes" / "layers.3" / "sae.safetensors"
    tensors = load_file(file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "shape":
        save_file(tensors | {"W_dec": tensors["W_dec"][:, 1:].contiguous()}, file)
    elif damage == "missing":
        save_file({k: v for k, v in tensors.items() if k != "b_enc"}, file)
    else:
        edit(file.with_name("cfg.json"), format=99)
    with pytest.raises(UserError, match=message):
        export(run, "format=saelens")
    assert not (run / "export").exists()


def test_an_architecture_with_an_unknown_tensor_is_not_folded():
    from tests.helpers.shelf import more_of

    sae = build("topk", tensors_of("topk"), **more_of("topk"))
    check_holds(FORMATS["sparsify"], sae, "layers.0")
    sae.register_buffer("temperature", torch.ones(()))
    with pytest.raises(UserError, match="a tensor temperature"):
        fold_norm_factor(sae, 2.0)


@pytest.mark.parametrize(
    ("module", "argument", "message"),
    [
        ("export", "formt=saelens", "formt is unknown. Did you mean format?"),
        ("import_saes", "saes=some,where=1", "saes=some,where=1: there is no such folder."),
        ("import_saes", "nums_groups=3", "nums_groups is unknown. Did you mean num_groups"),
        ("import_saes", "name=there", "which SAEs? Give saes=<folder>"),
    ],
)
def test_the_command_line_answers_with_one_sentence_and_status_2(
    module, argument, message, tmp_path
):
    command = [sys.executable, "-m", f"groupsae.{module}", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_groupings_of_one_run_are_exported_next_to_each_other(
    tiny_lm, tiny_text, tmp_path_factory, tmp_path
):
    whole = evaluated("all", tiny_lm, tiny_text, tmp_path_factory.getbasetemp())
    run = shutil.copytree(whole, tmp_path / "run")
    export(run, "format=saelens")
    export(run, "format=saelens", "grouping=per_layer")
    found = {folder.name: len(list(folder.iterdir())) for folder in (run / "export").iterdir()}
    assert found == {"saelens": 4, "saelens-per_layer": 4}
