"""The commands as Python functions: the same runs, and nothing left behind in the process."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf import OmegaConf

import groupsae
from groupsae.config.arguments import arguments_of
from groupsae.config.instantiate import CONF
from tests.helpers.runs import composed, overrides, run, saved, stopped
from tests.test_architecture import loaded_by

GROUPS = ("groups=count", "groups.num_groups=2")


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


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("tokens=1", "is one text: give a list"),
        (["groups=amd"], "Did you mean amad"),
        (["tokns=1"], "Did you mean tokens"),
        (["groups.theta=0.1,0.2"], "call the function once for each"),
        (["--multirun"], "cannot read the argument --multirun"),
        ({"groups": "count"}, "groups.num_groups has no default"),
        ({"seed": object()}, "of type object"),
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
