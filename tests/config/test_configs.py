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
from groupsae.config.instantiate import CONF
from groupsae.data.activations import ActivationDataModule
from groupsae.evaluation.intervals import Bootstrap
from groupsae.grouping.rules import RULES
from groupsae.training.callbacks.grouping import GroupLayers
from groupsae.training.optim import Adam

PACKAGE = Path(inspect.getfile(groupsae)).parent
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
FROM_PROGRAM = {"groupsae.sae": {"d_model", "layers", "generator"}}
REQUIRED = inspect.Parameter.empty
# keys next to a class's own values, for others to read
EXTRA = {"groupsae.data": {"cache", "cache_dtype"}}


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


def parameters(made: Callable[..., Any]) -> dict[str, Any]:
    """Return the names of the parameters, all of which must be keyword-only, with their defaults.

    A class that hands `**others` on to the class above it has that one's parameters as well.
    """
    names: dict[str, Any] = {}
    for p in inspect.signature(made).parameters.values():
        if p.kind is inspect.Parameter.VAR_KEYWORD:
            assert isinstance(made, type)
            names |= parameters(made.__mro__[1])
            continue
        ours = not isinstance(made, type) or "__init__" in vars(
            made
        )  # Lightning's are as they are
        assert not ours or p.kind is inspect.Parameter.KEYWORD_ONLY, f"{made}: {p.name}"
        names[p.name] = p.default
    return names


def required(made: Callable[..., Any]) -> set[str]:
    return {name for name, default in parameters(made).items() if default is REQUIRED}


def ours(cfg: DictConfig) -> Iterator[tuple[DictConfig, set[str]]]:
    """Yield every node that names a class of ours, and which keys are for its constructor."""
    for node in targets(cfg):
        if node._target_.startswith("groupsae."):
            keys = {str(key) for key in node if not str(key).startswith("_")}
            yield node, keys - EXTRA.get(room_of(node), set())


def room_of(node: DictConfig) -> str:
    return ".".join(node._target_.split(".")[:2])


def test_there_are_options_to_test():
    assert {"data", "groups", "model", "sae", "trainer", "logger", "experiment"} <= set(GROUPS)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_with_nothing_left_open(group, option):
    cfg = chosen(group, option)
    assert OmegaConf.missing_keys(cfg) == set()
    assert OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_yaml_keys_are_parameters_of_our_classes_and_none_is_missing(group, option):
    for node, keys in ours(chosen(group, option)):
        made = get_object(node._target_)
        assert keys <= set(parameters(made)), node._target_
        assert required(made) <= keys | FROM_PROGRAM.get(room_of(node), set()), node._target_


# where an option's yaml file has another value than the constructor: what an experiment fixes
DIFFERENT = {
    ("sae", "batchtopk"): {"expansion": (16, None)},
    ("sae", "gated"): {"expansion": (16, None)},
    ("sae", "jumprelu"): {"expansion": (16, None)},
    ("sae", "matryoshka"): {"expansion": (16, None)},
    ("sae", "relu"): {"expansion": (16, None)},
    ("sae", "topk"): {"expansion": (16, None)},
    ("data", "pile"): {"column": ("tokens", None)},
}


@pytest.mark.parametrize(
    ("group", "option"),
    [o for o in OPTIONS if o[0] in ("data", "groups", "model", "optim", "sae")],
)
def test_yaml_values_are_the_constructors_defaults_but_for_these(group, option):
    # a Pythia model brings no values of its own for the SAE and the optimiser
    others = [] if group == "model" else ["model=pythia-160m"]
    cfg = composed(*others, f"{group}={option}", *NAMED.get((group, option), []))
    found = {}
    for node, keys in ours(cfg[group]):
        defaults = parameters(get_object(node._target_))
        for key in keys:
            value = OmegaConf.to_container(node, resolve=True)[key]
            default = list(defaults[key]) if isinstance(defaults[key], tuple) else defaults[key]
            if default is not REQUIRED and (default or None) != (value or None):
                found[key] = (value, default)
    assert found == DIFFERENT.get((group, option), {})


def test_every_target_exists():
    found = list(targets(composed()))
    assert found
    for node in found:
        assert callable(get_object(node._target_))


def test_stream_keys_are_the_parameters_of_the_data_module():
    runtime = {"lm", "source", "cache", "tokens", "seed"}
    assert set(composed().stream) | runtime == set(parameters(ActivationDataModule))


def test_calibration_keys_are_the_parameters_of_the_grouping_callback():
    runtime = {"choice", "folder", "cache", "show"}
    assert set(composed().calibration) | runtime == set(parameters(GroupLayers))


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
    code = "".join((PACKAGE / f"{reader}.py").read_text() for reader in readers)
    for key in composed(name=name):
        assert re.search(rf"\bcfg\.{key}\b|\(cfg, \"{key}\"\)", code), f"nobody reads {key}"


def test_training_and_the_evaluation_command_share_their_values():
    assert composed().evaluation == composed(name="evaluate").evaluation


def test_bootstrap_keys_are_the_parameters_of_the_bootstrap():
    assert set(composed().evaluation.bootstrap) | {"documents"} == set(
        inspect.signature(Bootstrap).parameters
    )


def test_the_replication_has_every_rule_and_the_sizes_of_the_embedded_default():
    cfg, embedded = composed("experiment=replication"), composed()
    assert set(cfg.groups.rules) == set(RULES) - {"variance"}  # which is newer than its figures
    assert cfg.evaluate
    cfg.stream.blocks_per_step //= 4  # the replication keeps the steps that it was made with
    assert (cfg.calibration.centring, cfg.b_dec_start) == ("none", "zero")
    cfg.calibration.centring = embedded.calibration.centring
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
