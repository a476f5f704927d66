"""A suite in a notebook: load, show, save, and the language model that it belongs to."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from groupsae import Suite, load_suite
from groupsae.files.atomic import write_json
from groupsae.runtime.errors import UserError
from tests.helpers import families
from tests.helpers.hub_stand_in import ask, serving
from tests.helpers.lms import frozen
from tests.helpers.shelf import edit, rows, run_folder


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "run", "topk")


def trained_on(run, folder, **options):
    """Let the SAEs of a run be those of a model in a folder; return the suite."""
    lm = frozen(folder, **options)
    edit_all(run, **lm.described(), weights=lm.fingerprint())
    return Suite.from_pretrained(run)


def edit_all(run, **changes):
    for file in run.glob("saes/*/cfg.json"):
        edit(file, **changes)


# ---- load ---------------------------------------------------------------------------------------


def test_a_run_is_loaded_by_both_names(run):
    suite = Suite.from_pretrained(str(run), device="cpu")
    assert suite.run == run
    assert torch.equal(load_suite(run).encode(rows(), 3), suite.encode(rows(), 3))
    assert suite.device == torch.device("cpu")
    assert Suite.from_pretrained(run, device="meta")[3].device == torch.device("meta")


def test_a_folder_that_is_no_finished_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no such folder. Name a run folder, or a repository"):
        Suite.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected saes/<group>/cfg.json"):
        Suite.from_pretrained(tmp_path)
    (tmp_path / ".hydra").mkdir()
    with pytest.raises(UserError, match="not finished, .*\\n  python -m groupsae.train resume="):
        Suite.from_pretrained(tmp_path)


def test_a_run_that_was_killed_while_it_wrote_its_saes_is_not_finished(tmp_path):
    from groupsae.grouping.partition import Partition
    from groupsae.grouping.plan import GroupPlan

    run = run_folder(tmp_path / "run", "topk")
    plan = GroupPlan(Partition([[0, 1], [2], [3]], [0.1, 0.0, 0.0], "complete"), "group", 4)
    (run / "summary.json").unlink()
    write_json(run / "groups.json", {"plan": plan.to_json()})
    with pytest.raises(UserError, match="is not finished"):
        Suite.from_pretrained(run)


# ---- the language model -------------------------------------------------------------------------


def test_the_model_is_the_one_that_it_was_trained_on(run, tiny_lm):
    suite = trained_on(run, tiny_lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = suite.load_model()
    assert isinstance(model, PreTrainedModel)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = tokenizer("def f(a, b):", return_tensors="pt")
    expected = frozen(tiny_lm).load_with_head(torch.device("cpu")).model(**tokens).logits
    assert torch.equal(model(**tokens).logits, expected)
    assert suite.load_model(dtype="bfloat16")[0].dtype == torch.bfloat16
    assert suite.load_model(dtype=torch.float16)[0].dtype == torch.float16
    eager = suite.load_model(attn_implementation="eager")[0]
    assert eager.config._attn_implementation == "eager"


def test_the_recorded_precision_is_kept(run, tiny_lm):
    assert trained_on(run, tiny_lm, dtype="bfloat16").load_model()[0].dtype == torch.bfloat16


def test_the_bundled_model_needs_no_network(run):
    model, tokenizer = trained_on(run, "tiny").load_model()
    assert model.config.architectures == ["GPTNeoXForCausalLM"]
    assert tokenizer.decode(tokenizer("self").input_ids) == "self"


@pytest.mark.parametrize(("family", "stack", "name"), [
    ("bert", None, "BertForMaskedLM"),
    ("t5", "encoder", "T5ForConditionalGeneration"),
    ("t5", "decoder", "T5ForConditionalGeneration"),
    ("gpt2", None, "GPT2LMHeadModel"),
])  # fmt: skip
def test_the_complete_model_comes_with_its_head(run, tiny_lm, tmp_path, family, stack, name):
    folder = families.save(family, tmp_path / "lm", tokenizer=tiny_lm)
    model, _ = trained_on(run, folder, stack=stack).load_model()
    assert type(model).__name__ == name


def test_a_model_that_moved_is_named_again(run, tiny_lm):
    suite = trained_on(run, tiny_lm)
    for config in suite.configs.values():
        config["model"] = "/nowhere/lm"
    with pytest.raises(UserError, match=r"cannot load model '/nowhere/lm'.*load_model\(name="):
        suite.load_model()
    assert suite.load_model(name=str(tiny_lm))[0].config.vocab_size == 512
    for config in suite.configs.values():
        del config["model"]
    with pytest.raises(UserError, match="does not name its language model"):
        suite.load_model()


def test_a_model_on_the_hub_is_loaded_at_the_commit_of_its_training(
    run, tiny_lm, tmp_path, monkeypatch
):
    """Also after its branch has moved; of a suite that names no commit, the user is warned."""
    files = {file.name: file.read_bytes() for file in tiny_lm.iterdir()}
    other = {**json.loads(files["config.json"]), "initializer_range": 0.5}
    with serving() as hub:
        ask(hub, monkeypatch, tmp_path)
        hub.repos["me/lm"] = []
        hub.commit("me/lm", files)
        lm = frozen("me/lm")
        edit_all(run, **lm.described(), commit=lm.commit, weights=lm.fingerprint())
        hub.commit("me/lm", {**files, "config.json": json.dumps(other).encode()})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, _ = Suite.from_pretrained(run).load_model()
        assert model.config.initializer_range != 0.5
        edit_all(run, commit=None)
        with pytest.warns(UserWarning, match="has other weights now"):
            model, _ = Suite.from_pretrained(run).load_model()
        assert model.config.initializer_range == 0.5


def test_other_weights_than_in_training_are_noticed(run, tiny_lm):
    suite = trained_on(run, tiny_lm)
    suite.cfg["weights"] = "other"
    with pytest.warns(UserWarning, match="has other weights now than when the SAEs were trained"):
        suite.load_model()


@pytest.mark.parametrize("load", [{"trust_remote_code": True}, {"use_kernels": True},
                                  {"attn_implementation": "stranger/kernel"}])  # fmt: skip
def test_code_of_the_models_owner_runs_only_when_asked(run, tiny_lm, load):
    suite = trained_on(run, tiny_lm)
    suite.cfg["load"] = load
    with pytest.raises(UserError, match=f"loaded with {next(iter(load))}, which runs code of its"):
        suite.load_model()


def test_code_of_the_models_owner_runs_when_asked(run, tiny_lm):
    suite = trained_on(run, tiny_lm, load={"trust_remote_code": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        suite.load_model(trust_remote_code=True)
    suite.cfg["load"] = {"attn_implementation": "stranger/kernel"}
    suite.load_model(attn_implementation="eager")


def test_only_the_language_model_needs_transformers(run):
    code = f"""
import sys
for name in ("lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb", "datasets",
             "transformers", "torchmetrics"):
    sys.modules[name] = None   # importing it raises ImportError
import torch, groupsae
suite = groupsae.Suite.from_pretrained({str(run)!r})
sae = suite[3]
sae.decode(sae.encode(torch.ones(2, 16))), sae(torch.ones(2, 16)), sae.direction(1), repr(sae)
repr(suite), suite._repr_html_(), suite.save({str(run.parent / "saved")!r})
try:
    suite.load_model()
except ImportError as error:
    print("load_model:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "load_model: import of transformers halted" in done.stdout


# ---- save ---------------------------------------------------------------------------------------


def test_a_saved_suite_is_loaded_with_its_results(run, tmp_path):
    write_json(run / "summary.json", {"groups": {"layers.3": {"fvu": 0.125, "l0": 5.0}}})
    (run / "figures").mkdir()
    (run / "figures" / "amad.png").write_bytes(b"a picture")
    suite = Suite.from_pretrained(run)
    folder = suite.save(tmp_path / "saved")
    again = Suite.from_pretrained(folder)
    assert again.configs == suite.configs
    assert all(torch.equal(a(rows()), b(rows())) for a, b in zip(suite, again, strict=True))
    assert repr(again) == repr(suite)
    assert (folder / "figures" / "amad.png").read_bytes() == b"a picture"
    with pytest.raises(UserError, match=r"saved exists: save\(..., overwrite=True\) replaces it"):
        suite.save(folder)
    suite[3].b_dec.zero_()
    suite.save(folder, overwrite=True)
    assert not Suite.from_pretrained(folder)[3].b_dec.any()


def test_a_run_is_never_replaced(run, tmp_path):
    suite = Suite.from_pretrained(run)
    (run / ".hydra").mkdir()
    for folder in (run, run.parent):
        with pytest.raises(UserError, match="does not replace"):
            suite.save(folder, overwrite=True)
    other = run_folder(tmp_path / "other", "topk")
    (other / ".hydra").mkdir()
    with pytest.raises(UserError, match="does not"):
        suite.save(other, overwrite=True)


def test_a_grouping_that_is_saved_is_loaded_without_its_name(tmp_path):
    from groupsae.grouping.partition import Partition
    from groupsae.grouping.plan import GroupPlan

    run = run_folder(tmp_path / "run", "topk")
    plan = GroupPlan(Partition([[0, 1], [2], [3]], [0.1, 0.0, 0.0], "complete"), "group", 4)
    write_json(run / "groups.json", {"plan": plan.to_json()})
    suite = load_saes_of(run, ["layers.3"])
    assert not (suite.save(tmp_path / "part") / "groups.json").exists()
    assert Suite.from_pretrained(tmp_path / "part").layers == [3]


def load_saes_of(run, names):
    from groupsae.suite.suite import load_saes

    return load_saes(run / "saes", names)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated"])
def test_a_suite_of_ones_own_saes_is_saved(tmp_path, kind):
    """Made in a notebook: its configuration names only layers and factors."""
    sae = Suite.from_pretrained(run_folder(tmp_path / "run", kind))[3].sae
    config = {"layers": [3], "norm_factors": {3: 2.0}}
    mine = Suite({"mine": sae}, {"mine": config})
    again = Suite.from_pretrained(mine.save(tmp_path / "mine"))
    assert torch.equal(again[3](rows()), mine[3](rows()))
    assert again[3].norm_factor == 2.0


# ---- show ---------------------------------------------------------------------------------------


def test_a_suite_is_shown_as_a_table(run):
    summary = {"groups": {"layers.3": {"fvu": 0.125, "l0": 5.0}}}
    write_json(run / "summary.json", summary)
    suite = Suite.from_pretrained(run)
    assert repr(suite) == (
        "Suite of 2 SAEs for 3 layers of EleutherAI/pythia-14m (resid_post, d_model 16)\n"
        "       SAE layers        kind latents tokens    FVU  L0\n"
        "layers.0-1    0-1 topk, k = 5      48  1,000      -   -\n"
        "  layers.3      3 topk, k = 5      48  1,000 0.1250 5.0"
    )
    html = suite._repr_html_()
    assert "<td>0.1250</td>" in html
    assert "<th>latents</th>" in html
    found = suite.table()
    assert found["layers"].tolist() == [[0, 1], [3]]
    assert found["fvu"].tolist() == [None, 0.125]


def test_imported_saes_show_the_mean_over_their_layers_of_the_evaluation(run):
    (run / "evaluation").mkdir()
    results = [
        {"sae": "layers.0-1", "layer": 0, "fvu": {"value": 0.25}, "l0": 4.0},
        {"sae": "layers.0-1", "layer": 1, "fvu": {"value": 0.75}, "l0": 6.0},
        {"sae": "layers.3", "layer": 3, "fvu": None},
    ]
    write_json(run / "evaluation" / "evaluation.json", {"results": results})
    assert Suite.from_pretrained(run).table()["fvu"].tolist() == [0.5, None]


def test_html_of_a_stranger_is_escaped(run):
    edit_all(run, model="<script>alert(1)</script>")
    evil = run / "saes" / "<b>x"
    (run / "saes" / "layers.3").rename(evil)
    html = Suite.from_pretrained(run)._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<b>" not in html


def test_what_an_sae_prints():
    from tests.helpers.saes import FAMILY, make

    shown = {kind: str(make(kind)) for kind in FAMILY}
    assert shown == {
        "topk": "TopK(d_model=6, d_sae=24, k=3)",
        "batchtopk": "BatchTopK(d_model=6, d_sae=24, k=3)",
        "matryoshka": "Matryoshka(d_model=6, d_sae=24, k=3, prefixes=[6, 12, 24])",
        "jumprelu": "JumpReLU(d_model=6, d_sae=24, target_l0=3)",
        "relu": "ReLU(d_model=6, d_sae=24, l1_coefficient=0.3)",
        "gated": "Gated(d_model=6, d_sae=24, l1_coefficient=0.3)",
    }
