"""SAEs of other libraries become a run of ours that computes what they did, or are refused."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from groupsae.app.import_saes import import_saes, take_split
from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import CONF
from groupsae.export import export
from groupsae.import_saes import import_saes as command
from groupsae.interop import group_sae
from groupsae.interop.formats import FORMATS
from groupsae.reporting.page import write_report
from groupsae.runtime.errors import UserError
from groupsae.suite.importing import ReadAt, plan_of, read_folder
from groupsae.suite.suite import load_suite
from groupsae.train import train
from tests.helpers.evaluated import evaluate, evaluated
from tests.helpers.foreign import dictionary, saelens, sparsify
from tests.helpers.runs import composed, overrides, run
from tests.helpers.shelf import D_MODEL, D_SAE, K, dense, edit, naive, rows, run_folder, tensors_of

n, d = D_SAE, D_MODEL


PLACE = {"format": 1, "layer": 1, "hookpoint": "resid_post", "model": "EleutherAI/pythia-14m"}


def read(path: Path, **changes):
    at = {"num_layers": 12, "d_model": d, "hookpoint": "resid_post", "stack": "decoder"}
    at |= {key: changes.pop(key) for key in at.keys() & changes.keys()}
    return read_folder(path, ReadAt(**at), **changes)


def imported(saes: Path | str, *arguments: str) -> Path:
    register_resolver()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return import_saes(compose("import_saes", [f"saes={saes}", *arguments]), arguments)


def refused(saes: Path | str, *arguments: str) -> str:
    """Return the error of the command."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("import_saes", [f"saes={saes}", *arguments])
    with pytest.raises(UserError) as raised:
        command(cfg)
    return str(raised.value)


def sized(tensors, factor=None):
    """Return the tensors with decoder rows of norms 0.5 to 3."""
    norms = torch.linspace(0.5, 3, n) if factor is None else factor
    return {**tensors, "W_dec": tensors["W_dec"] * norms.unsqueeze(1)}


def same(found, acts, x_hat, x):
    """Compare up to the scale of a latent, which moves with its decoder row's norm."""
    latents = dense(found.sae, x).double()
    torch.testing.assert_close(latents > 0, acts > 0)
    decoded = found.sae.decode_dense(latents.float()).double()
    torch.testing.assert_close(decoded, x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_norms_of_decoder_rows_are_folded_where_that_is_exact(tmp_path, kind):
    tensors = sized(tensors_of(kind))
    name = {"relu": "standard"}.get(kind, kind)
    (found,) = read(saelens(tmp_path / "sae", tensors, architecture=name))
    norms = found.sae.directions().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(n))
    assert "were folded" in found.notes[0]
    same(found, *naive(kind, tensors, rows()), rows())


def test_a_topk_that_chose_by_activation_times_norm_is_folded(tmp_path):
    tensors, x = sized(tensors_of("topk")), rows()
    norms = tensors["W_dec"].norm(dim=1)
    weighted = {"W_enc": tensors["W_enc"] * norms[:, None], "b_enc": tensors["b_enc"] * norms}
    plain = {**tensors, **weighted, "W_dec": tensors["W_dec"] / norms[:, None]}
    folder = saelens(
        tmp_path / "s", tensors, architecture="topk", k=K, rescale_acts_by_decoder_norm=True
    )
    (found,) = read(folder)
    same(found, *naive("topk", plain, x), x)


def test_a_topk_with_free_norms_is_kept_with_a_note(tmp_path):
    tensors, x = sized(tensors_of("topk")), rows()
    (found,) = read(sparsify(tmp_path / "layers.4", tensors))
    assert "kept unchanged" in found.notes[0]
    assert torch.equal(found.sae.W_dec, tensors["W_dec"])
    same(found, *naive("topk", tensors, x), x)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated", "topk"])
def test_an_sae_that_does_not_subtract_b_dec_is_folded(tmp_path, kind):
    tensors, x = tensors_of(kind), rows()
    name = {"relu": "standard"}.get(kind, kind)
    folder = saelens(tmp_path / "s", tensors, architecture=name, k=K, apply_b_dec_to_input=False)
    (found,) = read(folder)
    whole = x + tensors["b_dec"]  # the definition subtracts it again
    same(found, *naive(kind, tensors, whole), x)


def test_an_autoencoder_of_the_april_update_is_read(tmp_path):
    tensors, x = sized(tensors_of("relu")), rows()
    state = {
        "encoder.weight": tensors["W_enc"], "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(), "decoder.bias": tensors["b_dec"],
    }  # fmt: skip
    (found,) = read(dictionary(tmp_path / "sae", "AutoEncoderNew", state))
    assert found.layers == [4]
    same(found, *naive("relu", tensors, x + tensors["b_dec"]), x)


def test_a_jumprelu_without_positive_thresholds_is_a_relu(tmp_path):
    tensors, x = tensors_of("jumprelu"), rows()
    tensors["threshold"] = torch.linspace(-1, 0, n)
    (found,) = read(saelens(tmp_path / "s", tensors, architecture="jumprelu"))
    same(found, *naive("jumprelu", tensors, x), x)


def test_saelens_before_version_6_is_read(tmp_path):
    folder = saelens(
        tmp_path / "s", tensors_of("topk"), activation_fn_str="topk",
        activation_fn_kwargs={"k": K}, hook_name="blocks.2.hook_resid_post", metadata=None,
    )  # fmt: skip
    (found,) = read(folder)
    assert found.layers == [2]
    same(found, *naive("topk", tensors_of("topk"), rows()), rows())


def test_half_precision_is_read_as_float32(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of("topk").items()}
    (found,) = read(sparsify(tmp_path / "layers.4", tensors))
    assert found.sae.W_enc.dtype == torch.float32
    assert torch.equal(found.sae.W_enc, tensors["W_enc"].float())


# ---- the paper's checkpoints ----------------------------------------------------------------


@pytest.mark.parametrize("num_layers", group_sae.CLUSTERS)
def test_every_published_group_of_several_layers_has_a_cluster(num_layers):
    known = {tuple(range(a, b + 1)) for a, b in group_sae.CLUSTERS[num_layers].values()}
    needed = set()
    for count in range(1, len(group_sae.BEGINNINGS[num_layers]) + 2):
        groups = group_sae.partition(count, num_layers)
        assert len(groups) == count
        assert sorted(x for g in groups for x in g) == list(range(num_layers - 1))
        new = {tuple(group) for group in groups if len(group) > 1} - needed
        named = {k for k in group_sae.CLUSTERS[num_layers] if k.startswith(f"k{count}-")}
        assert len(named) == len(new)  # trained once, at the first G that has it
        needed |= new
    assert needed == known


def test_the_published_partitions_of_pythia_1b_are_the_golden_ones():
    golden = json.loads(
        (Path(__file__).parents[1] / "helpers" / "golden" / "pythia_1b.json").read_text()
    )
    lists = [v for v in golden.values() if isinstance(v, dict | list)]
    text = json.dumps(lists).replace(" ", "")
    for count in (2, 6, 10):
        assert json.dumps(group_sae.partition(count, 16)).replace(" ", "") in text


def checkpoints(folder: Path) -> Path:
    """Make a repository as the authors published them, for a model of 12 layers."""
    for seed, layer in enumerate(range(12)):
        sparsify(folder / "baseline" / f"layers.{layer}", tensors_of("topk", seed), jumprelu=False)
    for seed, name in enumerate(group_sae.CLUSTERS[12]):
        sparsify(folder / "cluster" / name, tensors_of("topk", 100 + seed), jumprelu=False)
    factors = {f"gpt_neox.layers.{x}": torch.tensor(0.1 + x) for x in range(12)}
    for part in ("baseline", "cluster"):
        torch.save(factors, folder / part / "scaling_factors.pt")
    return folder


def test_the_papers_checkpoints_are_read_with_each_layers_factor(tmp_path):
    found = read(checkpoints(tmp_path / "repo"), num_groups=6)
    assert sorted(each.layers for each in found) == [
        [0, 1], [2], [3, 4], [5, 6], [7, 8], [9, 10], [11],
    ]  # fmt: skip
    by_layer = {each.layers[0]: each for each in found}
    assert by_layer[5].norm_factors == {5: pytest.approx(5.1), 6: pytest.approx(6.1)}
    assert by_layer[5].folder == Path("cluster/k5-c0")
    assert torch.equal(by_layer[5].sae.b_enc, tensors_of("topk", 107)["b_enc"])
    baseline = read(tmp_path / "repo")
    assert [each.layers for each in baseline] == [[layer] for layer in range(12)]
    with pytest.raises(UserError, match="into 1 to 10 groups were published"):
        read(tmp_path / "repo", num_groups=11)
    sparsify(tmp_path / "repo" / "more" / "layers.2", tensors_of("topk"), jumprelu=False)
    with pytest.raises(UserError, match="layer 2 has two SAEs"):
        read(tmp_path / "repo")
    with pytest.raises(UserError, match="layers.2 serve the same layers"):
        read(tmp_path / "repo", num_groups=6)


def test_a_single_folder_of_the_paper_may_hold_its_own_factors(tmp_path):
    folder = sparsify(tmp_path / "layers.3", tensors_of("topk"))
    torch.save({"layers.3": 0.25}, folder / "scaling_factors.pt")
    (found,) = read(folder)
    assert (found.format, found.norm_factors) == ("group-sae", {3: 0.25})
    torch.save({"layers.2": 0.25}, folder / "scaling_factors.pt")
    with pytest.raises(UserError, match="no factor above 0 for layer 3"):
        read(folder)


@pytest.mark.parametrize(
    "factors", [1.0, None, {"embed": 1.0}, {"layers.3": torch.ones(2)}, ["a"], {"layers.3": 1e999}]
)
def test_wrong_factors_are_named(tmp_path, factors):
    folder = sparsify(tmp_path / "layers.3", tensors_of("topk"))
    torch.save(factors, folder / "scaling_factors.pt")
    with pytest.raises(
        UserError, match=r"layers\.3 is damaged \(\w+: |no factor above 0 for layer 3"
    ):
        read(folder)


def test_a_wrong_list_of_clusters_is_named(tmp_path):
    folder = sparsify(tmp_path / "k99-c0", tensors_of("topk"))
    (tmp_path / "config.json").write_text('{"clusters": [1, 2]}')
    with pytest.raises(UserError, match=r"k99-c0 is damaged \(AttributeError"):
        read(folder)


# ---- what is refused ------------------------------------------------------------------------


class Code:
    """Unpickling this would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", ["torch", "plain"])
def test_a_pickle_with_code_in_it_is_not_read(tmp_path, protocol):
    folder = dictionary(tmp_path / "sae", "AutoEncoder", {})
    evil = {"encoder.weight": Code(tmp_path / "ran")}
    if protocol == "torch":
        torch.save(evil, folder / "ae.pt")
    else:
        (folder / "ae.pt").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match="contains more than tensors.*run its author"):
        read(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["ae.pt", "sae_weights.safetensors", "sae.safetensors"])
@pytest.mark.parametrize("kept", [0, 20, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, file, kept):
    if file == "ae.pt":
        folder = dictionary(tmp_path / "s", "AutoEncoder", {"bias": torch.zeros(d)})
    elif file == "sae.safetensors":
        folder = sparsify(tmp_path / "layers.4", tensors_of("topk"))
    else:
        folder = saelens(tmp_path / "s", tensors_of("relu"))
    content = (folder / file).read_bytes()
    length = kept if kept >= 1 else int(kept * len(content))
    (folder / file).write_bytes(content[:length])
    with pytest.raises(UserError, match=f"{file} is damaged"):
        read(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    tensors = tensors_of("relu")
    tensors["b_enc"] = tensors["b_enc"][1:]
    with pytest.raises(UserError, match=r"b_enc has shape \[47\].*requires \[48\]"):
        read(saelens(tmp_path / "a", tensors))
    more = {**tensors_of("relu"), "b_skip": torch.zeros(d)}
    with pytest.raises(UserError, match="an extra tensor b_skip"):
        read(saelens(tmp_path / "b", more))
    state = {"bias": torch.zeros(d), "encoder.weight": torch.zeros(n, d),
             "encoder.bias": torch.zeros(n), "decoder.weight": torch.zeros(n, d)}  # fmt: skip
    with pytest.raises(
        UserError, match=r"decoder.weight has shape \[48, 16\].*requires \[16, 48\]"
    ):
        read(dictionary(tmp_path / "c", "AutoEncoder", state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "temporal"},
            "architecture 'temporal'. Of SAELens",
        ),
        ({"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm'"),
        (
            {"metadata": {"hook_name": "blocks.1.attn.hook_z"}},
            "as 'blocks.1.attn.hook_z', which is not known: its hook_name must be blocks",
        ),
        ({"architecture": "topk", "k": 99}, "/s: sae.k is 99.*up to the 48 latents"),
        ({"metadata": [1]}, "/s is damaged"),
        ({"architecture": ["topk"]}, r"is damaged \(TypeError"),
        ({"architecture": "topk", "activation_fn_kwargs": [1]}, r"is damaged \(AttributeError"),
        (
            {"metadata": {"groupsae": {"format": 99}}},
            "in format 99, and this version reads format 1",
        ),
    ],
)
def test_what_saelens_has_and_we_do_not_is_refused(tmp_path, changes, message):
    folder = saelens(tmp_path / "s", tensors_of("relu"))
    edit(folder / "cfg.json", **changes)
    with pytest.raises(UserError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, 'only those with activation = "topk"'),
        ({"transcode": True}, "transcode = True"),
        ({"k": 0}, "/layers.4: sae.k is 0; it must be an integer from 1"),
        ({"groupsae": "yes"}, r"is damaged \(TypeError"),
        ({"groupsae": {"format": 99}}, "in format 99, and this version reads format 1"),
        ({"groupsae": PLACE | {"layer": -1}}, "is for layer -1"),
        ({"groupsae": PLACE | {"hookpoint": "there"}}, "has hookpoint there, but .* resid_post"),
        (
            {"groupsae": PLACE | {"stack": "encoder"}},
            "has stack encoder, but .* with stack decoder: give model.stack=encoder",
        ),
    ],
)
def test_what_sparsify_has_and_we_do_not_is_refused(tmp_path, changes, message):
    folder = sparsify(tmp_path / "layers.4", tensors_of("topk"), **changes)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_a_batchtopk_whose_threshold_was_never_set_is_refused(tmp_path):
    t = tensors_of("batchtopk")
    state = {
        "encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "b_dec": t["b_dec"],
        "decoder.weight": t["W_dec"].T.contiguous(), "k": torch.tensor(K),
        "threshold": torch.tensor(-1.0),
    }  # fmt: skip
    with pytest.raises(UserError, match="has no threshold"):
        read(dictionary(tmp_path / "s", "BatchTopKSAE", state, k=K))
    state["threshold"] = t["threshold"]
    (found,) = read(dictionary(tmp_path / "t", "BatchTopKSAE", state, k=K))
    same(found, *naive("batchtopk", t, rows()), rows())
    with pytest.raises(UserError, match="layer -1, but the model has 12 layers"):
        read(dictionary(tmp_path / "v", "BatchTopKSAE", state, k=K, layer=-1))
    with pytest.raises(UserError, match=r"w is damaged \("):
        read(dictionary(tmp_path / "w", "BatchTopKSAE", state | {"k": torch.tensor([1, 2])}))
    with pytest.raises(UserError, match=r"x is damaged \(TypeError"):
        read(dictionary(tmp_path / "x", ["BatchTopKSAE"], state))
    state["b_dec"] = torch.full((d,), torch.nan)
    with pytest.raises(UserError, match=r"y is damaged \(b_dec contains NaN"):
        read(dictionary(tmp_path / "y", "BatchTopKSAE", state, k=K))
    with pytest.raises(UserError, match="dict_class 'Crosscoder'"):
        read(dictionary(tmp_path / "u", "Crosscoder", state))


def test_folders_that_do_not_fit_the_model_or_each_other_are_refused(tmp_path):
    for seed in (0, 1):
        sparsify(tmp_path / "run" / "layers.4" / f"seed{seed}", tensors_of("topk", seed))
    sparsify(tmp_path / "run" / "layers.5", tensors_of("topk"))
    with pytest.raises(UserError, match="layer 4 has two SAEs.*choose with only"):
        read(tmp_path / "run")
    found = read(tmp_path / "run", only=["layers.4/seed1", "layers.5"])
    assert [str(each.folder) for each in found] == ["layers.4/seed1", "layers.5"]
    one = tmp_path / "run" / "layers.5"
    with pytest.raises(UserError, match="layer 5, but the model has 4 layers"):
        read(one, num_layers=4)
    with pytest.raises(UserError, match="has d_model 16, but the model is read with d_model 32"):
        read(one, d_model=32)
    with pytest.raises(UserError, match="has hookpoint resid_post, but .* with hookpoint mlp_out"):
        read(one, hookpoint="mlp_out")
    with pytest.raises(UserError, match="no SAEs in .*that match only"):
        read(tmp_path / "run", only=["layers.9"])
    with pytest.raises(UserError, match="is a folder of sparsify, not of format=saelens"):
        read(one, format_name="saelens")
    with pytest.raises(UserError, match="there is no such folder.*as saes=hf:me/saes"):
        read(Path("me/saes"))
    with pytest.raises(UserError, match="chooses among the paper's checkpoints"):
        read(one, num_groups=3)
    ours = run_folder(tmp_path / "ours", "topk")
    (ours / "groups.json").write_text("{}")
    with pytest.raises(UserError, match="contains a run of groupsae"):
        read(ours)


# ---- a run of ours --------------------------------------------------------------------------


def on(tiny_lm, tiny_text, output, *more):
    return [
        f"output={output}", "model=hf", f"model.name={tiny_lm}", "data=files",
        f"data.path={tiny_text}", "tokens=3072", "stream.context=64", "stream.blocks_per_step=8",
        "stream.blocks_per_forward=4", "stream.heldout_fraction=0.1",
        "stream.calibration_fraction=0.1", "stream.heldout_tokens=1024", "stream.num_workers=0",
        *more,
    ]  # fmt: skip


# what the export itself names
SPLIT = ("tokens=", "stream.context", "stream.blocks_per_step", "stream.heldout", "stream.calib")


def fvu_of(evaluation):
    return {row["layer"]: row["fvu"]["value"] for row in evaluation["results"]}


@pytest.fixture(scope="module")
def ours(tiny_lm, tiny_text, tmp_path_factory):
    return evaluated("ordinary", tiny_lm, tiny_text, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_out_and_in_again_is_evaluated_to_the_same_figures(
    ours, tiny_lm, tiny_text, tmp_path, form, capsys
):
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        export(compose("export", [f"run={ours}", f"format={form}", f"output={tmp_path / 'out'}"]))
    at = [a for a in on(tiny_lm, tiny_text, tmp_path / "runs") if not a.startswith(SPLIT)]
    theirs = imported(tmp_path / "out", *at)
    assert "stream.blocks_per_step=8" in capsys.readouterr().out
    assert theirs == tmp_path / "runs" / tiny_lm.name / "imported" / "out"
    before = json.loads((ours / "evaluation" / "evaluation.json").read_text())
    after = evaluate(theirs)
    assert "were trained on, split alike" in capsys.readouterr().out
    assert (after["text"], after["tokens"]) == (before["text"], before["tokens"])
    expected, found = fvu_of(before), fvu_of(after)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([*found.values()], [expected[x] for x in found], rtol=1e-4)
    assert after["groupings"][0]["kind"] == "per_layer"
    assert after["groupings"][0]["cost"] is None
    page = write_report([theirs], None).read_text(encoding="utf-8")
    assert "layers.3" in page


@pytest.mark.slow
def test_saes_of_another_hookpoint_go_out_and_come_in(tiny_lm, tiny_text, tmp_path):
    at = "model.hookpoint=mlp_out"
    status, ours = run(overrides(tiny_lm, tiny_text, tmp_path / "runs", "evaluate=true", at))
    assert status == 0
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        export(compose("export", [f"run={ours}", "format=saelens", f"output={tmp_path / 'out'}"]))
    assert (tmp_path / "out" / "blocks.2.hook_mlp_out").is_dir()
    with pytest.raises(UserError, match="has hookpoint mlp_out.*give model.hookpoint=mlp_out"):
        imported(tmp_path / "out", *on(tiny_lm, tiny_text, tmp_path / "runs"))
    theirs = imported(tmp_path / "out", *on(tiny_lm, tiny_text, tmp_path / "runs", at))
    before = json.loads((ours / "evaluation" / "evaluation.json").read_text())
    expected, found = fvu_of(before), fvu_of(evaluate(theirs))
    np.testing.assert_allclose([*found.values()], [expected[x] for x in found], rtol=1e-4)


def test_a_note_is_printed_once_and_recorded_with_each_sae(tiny_lm, tiny_text, tmp_path, capsys):
    sizes = {"W_enc": (64, 32), "b_enc": (64,), "W_dec": (64, 32), "b_dec": (32,)}
    tensors = {name: torch.randn(*shape) for name, shape in sizes.items()}
    tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    for layer in (1, 2):
        metadata = {"hook_name": f"gpt_neox.layers.{layer}.mlp", "context_size": 128}
        saelens(tmp_path / "repo" / f"sae{layer}", tensors, metadata=metadata)
    at = on(tiny_lm, tiny_text, tmp_path / "runs")
    with pytest.raises(UserError, match="give model.hookpoint=mlp_out model.submodule=mlp"):
        imported(tmp_path / "repo", *at)
    run = imported(tmp_path / "repo", *at, "model.hookpoint=mlp_out")
    printed = capsys.readouterr().out
    assert printed.count("note: it was trained with context_size=128") == 1
    assert "(sae1, sae2)" in printed
    for layer in (1, 2):
        config = json.loads((run / "saes" / f"layers.{layer}" / "cfg.json").read_text())
        assert config["hookpoint"] == "mlp_out"
        assert config["adopted"]["notes"][0].startswith("it was trained with context_size=128")


@pytest.mark.slow
def test_saes_of_some_layers_in_groups_are_evaluated_and_reported(tiny_lm, tiny_text, tmp_path):
    """A group whose distances nobody measured, and layers without an SAE."""
    sizes = {"W_enc": (64, 32), "b_enc": (64,), "W_dec": (64, 32), "b_dec": (32,)}
    tensors = {name: torch.randn(*shape) for name, shape in sizes.items()}
    repo = tmp_path / "repo"
    folder = sparsify(repo / "cluster" / "k2-c0", tensors, d_in=32, expansion_factor=2)
    torch.save({f"layers.{x}": 0.5 + x for x in range(4)}, folder.parent / "scaling_factors.pt")
    (repo / "cluster" / "config.json").write_text(json.dumps({"clusters": {"k2-c0": [1, 2]}}))
    run = imported(repo, *on(tiny_lm, tiny_text, tmp_path / "runs"), f"name={tmp_path / 'run'}")
    suite = load_suite(run)
    assert suite.layers == [1, 2]
    assert [suite.norm_factor(layer) for layer in (1, 2)] == [1.5, 2.5]
    before = write_report([run], None).read_text(encoding="utf-8")
    assert "layers.1-2" in before
    with pytest.raises(UserError, match="were imported, not trained here"):
        train(composed([f"resume={run}"]), [])
    evaluation = evaluate(run)
    (grouping,) = evaluation["groupings"]
    assert grouping["sae_of_layer"] == {"1": "layers.1-2", "2": "layers.1-2"}
    assert grouping["amad"] is None
    assert [row["layer"] for row in evaluation["results"]] == [1, 2]
    assert "layers.1-2" in write_report([run], None).read_text(encoding="utf-8")


def test_nothing_is_left_of_an_import_that_fails(tiny_lm, tiny_text, tmp_path):
    good, bad = tensors_of("topk"), tensors_of("topk")
    bad["W_dec"] = bad["W_dec"][1:]
    sparsify(tmp_path / "repo" / "layers.1", good)
    sparsify(tmp_path / "repo" / "layers.2", bad)
    with pytest.raises(UserError, match=r"W_dec has shape \[47, 16\]"):
        imported(tmp_path / "repo", *on(tiny_lm, tiny_text, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="'gguf'; use saelens"):
        imported(tmp_path / "repo", "format=gguf")
    assert "which SAEs" in refused("null")
    for argument in ("evaluate=true", "interpret=true"):
        assert "are for training: import first" in refused(tmp_path / "repo", argument)
    with pytest.raises(UserError, match=r"name=../../x leaves the output folder"):
        imported(tmp_path / "repo", *on(tiny_lm, tiny_text, tmp_path / "runs"), "name=../../x")


@pytest.mark.parametrize("name", ["repo", ".", "mine"])
def test_overwriting_replaces_nothing_but_an_imported_run(
    tiny_lm, tiny_text, tmp_path, monkeypatch, name
):
    sizes = {"W_enc": (64, 32), "b_enc": (64,), "W_dec": (64, 32), "b_dec": (32,)}
    tensors = {name: torch.randn(*shape) for name, shape in sizes.items()}
    sparsify(tmp_path / "repo" / "layers.1", tensors, d_in=32, expansion_factor=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    there = [*on(tiny_lm, tiny_text, "runs"), "overwrite=true"]
    with pytest.raises(UserError, match="not replace"):
        imported("repo", *there, f"name={tmp_path / name}")
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.chdir("repo")
    for _ in range(2):  # a run that was imported is replaced
        assert imported(".", *there) == Path("runs") / tiny_lm.name / "imported" / "repo"


def test_neighbouring_layers_only(tmp_path):
    found = read(checkpoints(tmp_path / "repo"), num_groups=4)
    plan = plan_of(found, 12)
    assert [len(g) for g in plan.partition.groups] == [3, 4, 2, 2, 1]
    assert all(a[-1] + 1 == b[0] for a, b in pairwise(plan.partition.groups))
    assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))).saes == plan.saes


# ---- the split of an import -------------------------------------------------------------------


def split_taken(saes, *overrides):
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("import_saes", ["saes=x", *overrides])
    return cfg.stream, take_split(cfg, saes, overrides)


def exported(tmp_path, stream):
    """Return an SAE of an export whose run had these options."""
    folder = sparsify(tmp_path / "layers.1", tensors_of("topk"))
    edit(folder / "cfg.json", groupsae={**PLACE, "text": "abc", "copies": 0, "stream": stream})
    return read(folder)


def test_an_import_takes_the_split_that_an_export_names(tmp_path):
    theirs = {"heldout_fraction": 0.03, "max_tokens": 5000, "max_norm_ratio": None, "new": 1}
    saes = exported(tmp_path, theirs)
    assert saes[0].trained_on == {"text": "abc", "copies": 0, "stream": theirs}
    stream, taken = split_taken(saes)
    assert (stream.heldout_fraction, stream.max_tokens) == (0.03, 5000)
    assert taken == ["stream.heldout_fraction=0.03", "stream.max_tokens=5000"]
    stream, taken = split_taken(saes, "stream.heldout_fraction=0.2", "tokens=4096")
    assert (stream.heldout_fraction, stream.max_tokens, taken) == (0.2, None, [])


def test_a_split_that_only_some_saes_name_is_not_taken(tmp_path):
    saes = exported(tmp_path / "a", {"heldout_fraction": 0.03})
    assert (
        split_taken([*saes, *read(sparsify(tmp_path / "layers.2", tensors_of("topk")))])[1] == []
    )


def test_a_split_that_is_not_allowed_is_refused(tmp_path):
    with pytest.raises(UserError, match="stream.heldout_fraction is 7"):
        split_taken(exported(tmp_path, {"heldout_fraction": 7}))
