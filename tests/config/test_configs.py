"""The yaml files: every option composes, and every value reaches a parameter of the same name."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import groupsae
from groupsae.app.run_folder import register_resolver
from groupsae.config.arguments import CONF
from groupsae.data.activations import ActivationDataModule
from groupsae.evaluation.intervals import Bootstrap
from groupsae.grouping.rules import RULES
from groupsae.lm.build import build_gpt_neox
from groupsae.training.callbacks.grouping import GroupLayers
from groupsae.training.optim import Adam
from groupsae.training.pretraining import LanguageModel

GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
OPTIONS = [
    (group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))
]

# what a user has to name: any value will do here
NAMED = {
    ("model", "hf"): ["model.name=some/model"],
    ("model", "base"): ["model.name=some/model"],
    ("data", "files"): ["data.path=some/folder"],
    ("data", "hf"): ["data.name=some/data"],
    ("groups", "count"): ["groups.num_groups=3"],
    ("groups", "even"): ["groups.num_groups=3"],
    ("groups", "explicit"): ["groups.groups=[[0,1],[2]]"],
}
# what a class gets from the program, not from its yaml file
FROM_PROGRAM = {"groupsae.sae": {"d_model", "generator"}}
# what stands beside a class's own values, for others to read
BESIDE = {"groupsae.data": {"cache", "cache_dtype"}}


def composed(*overrides: str, name: str = "train") -> DictConfig:
    register_resolver()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def chosen(group: str, option: str) -> DictConfig:
    return composed(f"{group}={option}", *NAMED.get((group, option), []))


def targets(node: Any) -> Iterator[DictConfig]:
    """Yield every node that names a class, at any depth."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            if not OmegaConf.is_missing(node, key):
                yield from targets(node[key])


def without_defaults(made: Callable[..., Any]) -> set[str]:
    """Return the names of the parameters, all of which must be keyword-only, without a default.

    A class that hands `**others` on to the class above it has that one's parameters as well.
    """
    names = set()
    for p in inspect.signature(made).parameters.values():
        if p.kind is inspect.Parameter.VAR_KEYWORD:
            assert isinstance(made, type)
            names |= without_defaults(made.__mro__[1])
            continue
        assert p.kind is inspect.Parameter.KEYWORD_ONLY, f"{made}: {p.name} is not keyword-only"
        assert p.default is inspect.Parameter.empty, f"{made}: {p.name} has a default in Python"
        names.add(p.name)
    return names


def test_there_are_options_to_test():
    assert {"data", "groups", "model", "sae", "trainer", "logger", "experiment"} <= set(GROUPS)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_with_nothing_left_open(group, option):
    cfg = chosen(group, option)
    assert OmegaConf.missing_keys(cfg) == set()
    assert OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_yaml_keys_are_the_parameters_of_our_classes(group, option):
    for node in targets(chosen(group, option)):
        made = get_object(node._target_)
        if not node._target_.startswith("groupsae."):
            continue
        given = {key for key in node if not str(key).startswith("_")}
        room = ".".join(node._target_.split(".")[:2])
        given -= BESIDE.get(room, set())
        assert given | FROM_PROGRAM.get(room, set()) == without_defaults(made), node._target_


@pytest.mark.parametrize("name", ["train", "pretrain"])
def test_every_target_exists(name):
    found = list(targets(composed(name=name)))
    assert found
    for node in found:
        assert callable(get_object(node._target_))


def test_stream_keys_are_the_parameters_of_the_data_module():
    runtime = {"lm", "source", "cache", "tokens", "seed"}
    assert set(composed().stream) | runtime == without_defaults(ActivationDataModule)


def test_calibration_keys_are_the_parameters_of_the_grouping_callback():
    runtime = {"choice", "folder", "cache", "say"}
    assert set(composed().calibration) | runtime == without_defaults(GroupLayers)


def test_pretraining_keys_are_the_parameters_they_reach():
    cfg = composed(name="pretrain")
    assert set(cfg.model) == without_defaults(build_gpt_neox)
    assert set(cfg.optim) | {"lm", "num_steps"} == without_defaults(LanguageModel)


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("train", ["train", "app/run_folder", "app/fit"]),
        ("evaluate", ["evaluate", "app/run_folder"]),
        ("report", ["report"]),
    ],
)
def test_no_option_is_dead(name, readers):
    """Every key at the top of a command's yaml file is read by its entry points."""
    package = Path(groupsae.__file__).parent
    code = "".join((package / f"{reader}.py").read_text() for reader in readers)
    for key in composed(name=name):
        assert re.search(rf"\bcfg\.{key}\b|\(cfg, \"{key}\"\)", code), f"nobody reads {key}"


def test_no_option_of_the_evaluation_is_dead():
    package = Path(groupsae.__file__).parent
    code = (package / "app" / "evaluate.py").read_text()
    for key in composed().evaluation:
        assert re.search(rf"\boptions\.{key}\b", code), f"nobody reads evaluation.{key}"


def test_training_and_the_evaluation_command_share_their_values():
    assert composed().evaluation == composed(name="evaluate").evaluation


def test_bootstrap_keys_are_the_parameters_of_the_bootstrap():
    assert set(composed().evaluation.bootstrap) | {"documents"} == set(
        inspect.signature(Bootstrap).parameters
    )


def test_the_replication_has_every_rule_and_the_sizes_of_the_embedded_default():
    cfg, embedded = composed("experiment=replication"), composed()
    assert set(cfg.groups.rules) == set(RULES)
    assert cfg.evaluate
    for key in ("model", "data", "sae", "optim", "stream", "tokens", "calibration", "dead_after"):
        assert cfg[key] == embedded[key], key


@pytest.mark.parametrize(
    ("experiment", "model", "tokens_per_step"),
    [
        ("paper-160m", "EleutherAI/pythia-160m", 131072),
        ("paper-410m", "EleutherAI/pythia-410m", 65536),
        ("paper-1b", "EleutherAI/pythia-1b", 32768),
    ],
)
def test_the_paper_experiments_hold_the_papers_recipe(experiment, model, tokens_per_step):
    cfg = composed(f"experiment={experiment}")
    assert cfg.model.name == model
    assert cfg.data.name == "NeelNanda/pile-small-tokenized-2b"
    assert cfg.stream.blocks_per_step * cfg.stream.context == tokens_per_step
    assert cfg.stream.context == 1024
    assert cfg.tokens == 1_000_000_000
    assert (cfg.sae.k, cfg.sae.expansion) == (128, 16)
    assert (cfg.groups.theta, cfg.groups.last_layer) == (0.2, "own")
    assert cfg.calibration.tokens == 10_000_000
    assert cfg.calibration.centring == "none"
    optim = Adam(**{k: v for k, v in cfg.optim.items() if k != "_target_"})
    d_sae = 16 * 768
    assert optim.lr(d_sae) == pytest.approx(2e-4 / math.sqrt(d_sae / 2**14))


def test_the_embedded_default_brings_its_own_sizes():
    assert composed().tokens < composed("model=pythia-160m").tokens == 1_000_000_000


def test_a_pythia_model_brings_the_pile_along():
    assert composed("model=pythia-70m").data.name == "NeelNanda/pile-small-tokenized-2b"
