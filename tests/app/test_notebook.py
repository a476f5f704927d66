"""The commands as Python functions: the same runs, and nothing left behind in the process."""

import asyncio
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import groupsae
from groupsae.config.arguments import arguments_of
from groupsae.config.instantiate import CONF
from groupsae.data.packing import pack_texts, split_of
from groupsae.training.measure import Measurement
from tests.helpers.runs import composed, overrides, run, saved, stopped
from tests.test_architecture import loaded_by

GROUPS = ("groups=count", "groups.num_groups=2")
EVERYTHING = (
    "tokens=1024",
    "stream.heldout_fraction=0.03",
    "stream.calibration_fraction=0.03",
    "stream.heldout_tokens=1000000",
    "evaluate=true",
    "evaluation.together=true",
)


class Evaluated(NamedTuple):
    """A run, its language model with a head, and its texts by split."""

    trained: groupsae.TrainedRun
    model: Any
    texts: dict[str, list[str]]


@pytest.fixture(scope="module")
def command(
    tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """Return a command line, and the finished run of it."""
    arguments = overrides(tiny_lm, tiny_text, tmp_path_factory.mktemp("run"), *GROUPS)
    status, folder = run(arguments)
    assert status == 0
    return arguments, folder


def elsewhere(arguments: list[str], output: Path) -> list[str]:
    return [f"output={output}", *arguments[1:]]


def test_the_run_is_that_of_the_command(command: Any, tmp_path: Path) -> None:
    arguments, folder = command
    trained = groupsae.train(elsewhere(arguments, tmp_path))
    assert trained.folder.relative_to(tmp_path) == folder.relative_to(folder.parents[2])
    theirs = saved(folder)
    for name, tensor in saved(trained.folder).items():
        assert torch.equal(tensor, theirs[name])
    assert trained.suite.layers == [0, 1, 2, 3]
    assert trained.summary["steps"] == 6
    assert f"{len(trained.suite.saes)} SAEs" in repr(trained)
    assert "layers.3" in trained._repr_html_()


def test_a_finished_run_is_returned_whichever_way_it_is_named(command: Any) -> None:
    arguments, folder = command
    before = {file: file.stat().st_mtime_ns for file in folder.glob("saes/*/*")}
    values = dict(argument.lstrip("+").split("=") for argument in arguments)
    values["+trainer.enable_progress_bar"] = values.pop("trainer.enable_progress_bar")
    read = {key: OmegaConf.create(f"v: {value}").v for key, value in values.items()}
    for config in (arguments, tuple(arguments), read, composed(arguments)):
        assert groupsae.train(config).folder == folder
    assert {file: file.stat().st_mtime_ns for file in folder.glob("saes/*/*")} == before


def test_a_run_works_in_a_loop_and_in_hydra_and_leaves_both_alone(command: Any) -> None:
    arguments, folder = command

    async def cell() -> Path:
        return groupsae.train(arguments).folder

    with initialize_config_dir(str(CONF.resolve()), version_base="1.2"):
        mine, base = GlobalHydra.instance().hydra, VersionBase.instance().getbase()
        assert asyncio.run(cell()) == folder
        with pytest.raises(groupsae.UserError):
            groupsae.train(["groups=amd"])
        assert GlobalHydra.instance().hydra is mine
        assert VersionBase.instance().getbase() == base
    assert not GlobalHydra.instance().is_initialized()


def test_an_interrupted_call_leaves_a_checkpoint_and_resumes(command: Any, tmp_path: Path) -> None:
    arguments, folder = command
    again = elsewhere(arguments, tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="the same call resumes"):
        stopped(again, tell=lambda: signal.raise_signal(signal.SIGINT), by=groupsae.train)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in tmp_path.glob("*/*/*/checkpoints/step=*")] == ["step=3.ckpt"]
    resumed = saved(groupsae.train(again).folder)
    for name, tensor in saved(folder).items():
        assert torch.equal(tensor, resumed[name])


# ---- evaluation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(
    tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Evaluated:
    """Return a run that the command evaluated on all of its held-out text, and its texts."""
    texts: dict[str, list[str]] = {"train": [], "calibration": [], "heldout": []}
    for file in sorted(tiny_text.glob("*.txt")):
        texts[split_of(file.name, 0.03, 0.03)].append(file.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    count = len(pack_texts(texts["heldout"], tokenizer, context=64, vocab_size=512)[0])
    whole = max(each for each in range(1, 9) if count % each == 0)  # else some blocks are left out
    output = tmp_path_factory.mktemp("evaluated")
    arguments = [*GROUPS, *EVERYTHING, f"stream.blocks_per_step={whole}"]
    status, folder = run(overrides(tiny_lm, tiny_text, output, *arguments))
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    return Evaluated(groupsae.TrainedRun(folder), model, texts)


def test_the_figures_are_those_of_the_command_on_the_same_text(evaluated: Evaluated) -> None:
    trained, model, texts = evaluated
    theirs = trained.evaluation
    model.train()
    ours = groupsae.evaluate(
        trained.suite, model, texts["heldout"], mean_texts=texts["calibration"], together=True
    )
    assert model.training
    assert model.gpt_neox.layers[0].training
    assert list(ours.columns) == list(theirs.columns)
    assert {"sae", "layer", "fvu", "fvu_low", "fvu_high", "delta_ce"} <= set(ours.columns)
    # its variance is that of the blocks in one forward, which are others here
    mixed = [name for name in ours if name.startswith("explained_variance_legacy")]
    pd.testing.assert_frame_equal(ours.drop(columns=mixed), theirs.drop(columns=mixed), rtol=1e-4)
    for key in ("tokens", "predictions", "documents"):
        assert ours.attrs[key] == theirs.attrs[key]
    assert ours.attrs["ce"] == pytest.approx(theirs.attrs["ce"], rel=1e-5)
    mine, other = (each.attrs["groupings"][0]["spliced_together"] for each in (ours, theirs))
    assert mine["ce"] == pytest.approx(other["ce"], rel=1e-5)

    fewer = groupsae.evaluate(trained.suite, model, iter(texts["heldout"]), tokens=130)
    assert fewer.attrs["tokens"] == 128


def test_filters_and_bos_are_those_of_the_training(evaluated: Evaluated) -> None:
    trained, model, texts = evaluated
    suite = groupsae.load_suite(trained.folder)
    for config in suite.configs.values():
        config |= {"prepend_bos": True, "exclude_special_tokens": True, "skip_positions": 3}
    found = groupsae.evaluate(suite, model, texts["heldout"], tokens=640, context=32)
    assert found.attrs["tokens"] <= 640 * 29 // 32
    assert found.attrs["sequences"] == 20


def test_a_model_without_a_head_gives_the_reconstruction_only(
    evaluated: Evaluated, tiny_lm: Path
) -> None:
    trained, _, texts = evaluated
    model = AutoModel.from_pretrained(tiny_lm)
    found = groupsae.evaluate(trained.suite, model, texts["heldout"], tokens=640)
    assert found["fvu"].notna().all()
    assert "delta_ce" not in found


def test_a_run_is_evaluated_as_the_command_does(evaluated: Evaluated) -> None:
    before = evaluated.trained.evaluation
    for named in (evaluated.trained, evaluated.trained.folder, str(evaluated.trained.folder)):
        found = groupsae.evaluate(named)
    pd.testing.assert_frame_equal(found, before)


def test_what_does_not_fit_is_one_sentence(
    evaluated: Evaluated, tiny_lm: Path, tmp_path: Path
) -> None:
    (suite, texts), model = (evaluated.trained.suite, evaluated.texts["heldout"]), evaluated.model
    config = AutoConfig.from_pretrained(tiny_lm)

    def other(**changes: int) -> Any:
        return AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **changes}))

    for arguments, sentence in (
        ((suite, model), "on a model and texts"),
        ((evaluated.trained, model, texts), "only the run"),
        ((tmp_path,), "no run there"),
        ((suite, other(hidden_size=16), texts), "4 layers of width 32, but GPTNeoX.* has 4 of"),
        ((suite, other(num_hidden_layers=5), texts), "has 5 of width 32"),
        ((suite, torch.nn.Linear(2, 2), texts), "give a Hugging Face model"),
        ((suite, model, "a text"), "give a list of texts"),
        ((suite, model, ["a"]), "fill no block of 64"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
        with pytest.raises(groupsae.UserError, match=sentence):
            groupsae.evaluate(*arguments, tokenizer=tokenizer)
    with pytest.raises(groupsae.UserError, match="reads at most 64"):
        groupsae.evaluate(suite, model, texts, context=65)
    wrong: dict[str, Any] = {"tokens": -5, "batch_size": 0, "resamples": 0, "level": 95}
    for name, value in wrong.items():
        with pytest.raises(groupsae.UserError, match=f"{name} is {value}; it must be a"):
            groupsae.evaluate(suite, model, texts, **{name: value})
    with pytest.raises(groupsae.UserError, match="context is 1; it must be an integer of at"):
        groupsae.angular_distances(model, tokenizer, texts, context=1)
    nameless = other()
    nameless.name_or_path = ""
    with pytest.raises(groupsae.UserError, match="give tokenizer="):
        groupsae.evaluate(suite, nameless, texts)
    with pytest.raises(groupsae.UserError, match="was not evaluated"):
        groupsae.TrainedRun(tmp_path).evaluation  # noqa: B018
    with pytest.raises(groupsae.UserError, match="holds no finished run"):
        groupsae.TrainedRun(tmp_path).summary  # noqa: B018


# ---- distances --------------------------------------------------------------------------------


def test_distances_are_the_mean_angles_of_the_hidden_states(evaluated: Evaluated) -> None:
    _, model, texts = evaluated
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    found = groupsae.angular_distances(model, tokenizer, texts["heldout"], hookpoint="resid_pre")
    ids = [token for text in texts["heldout"] for token in [*tokenizer(text).input_ids, 0]]
    tokens = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    with torch.no_grad():
        states = model.eval()(tokens, output_hidden_states=True).hidden_states
    x = torch.stack(states[:4]).double().flatten(1, 2)  # the input of each block
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    naive = cosines.clamp(-1, 1).arccos().mean(-1) / torch.pi
    np.testing.assert_allclose(found, naive.fill_diagonal_(0), atol=1e-6)
    assert groupsae.choose(found, theta=0.9).num_groups == 1


def test_distances_are_those_of_the_run(evaluated: Evaluated) -> None:
    trained, model, texts = evaluated
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    stored = Measurement.load(trained.folder / "angles.npz")
    for centring in ("none", "mean"):
        found = groupsae.angular_distances(
            model, tokenizer, texts["calibration"], tokens=stored.tokens, centring=centring
        )
        same = np.allclose(found, stored.distances, atol=1e-6)
        assert same == (centring == "none")


# ---- what both share --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("model=tiny", "is one text: give a list of arguments"),
        (["groups=amd"], "Available options in 'groups': all amad"),
        (["tokns=1"], "Did you mean tokens"),
        (["groups.theta=0.1,0.2"], "call the function once for each"),
        (["--multirun"], "cannot read the argument --multirun"),
        ({"groups": "count"}, "groups.num_groups has no default"),
        ({"seed": "some"}, "seed is 'some'; it must be an integer"),
        ({"stream": {"contxt": 8}}, "contxt is unknown"),
        (OmegaConf.create({"seed": 1}), "the configuration lacks"),
    ],
)
def test_errors_are_the_sentences_of_the_command(config: Any, sentence: str) -> None:
    with pytest.raises(groupsae.UserError, match=sentence):
        groupsae.train(config)


def test_values_reach_the_configuration_as_they_are(tmp_path: Path) -> None:
    values = {
        "model": {"name": "true"},
        "data": "files",
        "data.path": tmp_path / "it's, a {folder}=1",
        "data.text_column": "12",
        "stream": {"max_norm_ratio": None, "prepend_bos": True},
        "groups": "all",
        "groups.rules": ["complete", "even"],
        "optim.base_lr": 1e-05,
        "+model.load": {"device_map": "auto", "options": {}},
    }
    cfg = composed(list(arguments_of(values)))
    assert cfg.model.name == "true"
    assert cfg.data.path == str(tmp_path / "it's, a {folder}=1")
    assert cfg.data.text_column == "12"
    assert (cfg.stream.max_norm_ratio, cfg.stream.prepend_bos) == (None, True)
    assert (cfg.groups.rules, cfg.optim.base_lr) == (["complete", "even"], 1e-05)
    assert cfg.model.load == {"device_map": "auto", "options": {}}


@pytest.mark.parametrize(
    "imports", ["import groupsae.train", "groupsae.train", "from groupsae.train import main"]
)
def test_the_function_is_there_whichever_import_comes_first(imports: str) -> None:
    loaded = loaded_by(
        f"import groupsae\n{imports}\nimport groupsae.train\n"
        "from groupsae import train\nassert groupsae.train is train\n"
        "assert train.__module__ == 'groupsae.app.notebook'\n"
        "assert callable(sys.modules['groupsae.train'].main)"
    )
    assert not loaded & {"torch", "lightning", "transformers"}
