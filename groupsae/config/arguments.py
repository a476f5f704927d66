"""Where the yaml files are, and a friendly word when a command names what is not in them."""

import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from groupsae.config.instantiate import CONF as CONF
from groupsae.config.instantiate import make as make
from groupsae.runtime.secrets import secret_in

INSTEAD = (
    "leave it out and set the environment variable HF_TOKEN (the Hugging Face Hub), WANDB_API_KEY "
    "(Weights & Biases) or HTTPS_PROXY (a proxy) instead."
)


def check_arguments(arguments: Sequence[str], name: str) -> None:
    """Exit with one sentence if an argument names an unknown key or option.

    Only our own yaml files are looked at, and only in commands that use no flag of Hydra's but
    `-m`: a user's own folder of yaml files (`--config-dir`) or `--help` is left to Hydra.

    Args:
        arguments: of the command line.
        name: of the command's yaml file, such as `train`.
    """
    for argument in arguments:  # before Hydra writes them down
        key, _, value = argument.partition("=")
        names = key.lstrip("+~").split(".")
        secret = secret_in({names[-1]: value}) or secret_in(argument)
        if secret is not None:
            _stop(f"{key} holds {secret[1]}, and run folders keep their configuration: {INSTEAD}")
    overrides = [a for a in arguments if a not in ("-m", "--multirun")]
    if any(a.startswith(("-", "hydra.searchpath")) for a in overrides):
        return
    parsed = [_parsed(each) for each in overrides]
    has = _groups(name)
    chosen: list[str] = []
    keys: list[str] = []
    for each in parsed:
        key = each.key_or_group
        added = each.is_add() or each.is_force_add()
        if each.is_delete() or each.package or "/" in key or key.startswith("hydra."):
            continue
        if (CONF / key).is_dir():
            options = _options(each, None if added else has, name)
            chosen += [] if added else [f"{key}={option}" for option in options[:1]]
        elif not added:
            keys.append(key)
    if not keys:
        return
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose(name, overrides=chosen))
    for key in keys:
        _check_key(key, values)


def plain_folder(argument: str) -> str:
    """Return an argument that names folders so that any character may be in their names.

    `run=a,b` becomes a list, which Hydra would take for a sweep.

    >>> plain_folder("run=outputs/a,outputs/b")
    "run=['outputs/a','outputs/b']"
    >>> plain_folder("resume=outputs/a=1")
    "resume='outputs/a=1'"
    """
    key, _, value = argument.partition("=")
    if (
        key not in ("run", "resume", "path", "to")
        or value in ("", "null", "???")
        or value[0] in "['\""
    ):
        return argument
    if key != "run":
        return f"{key}={_quoted(value)}"
    return f"run=[{','.join(_quoted(folder) for folder in value.split(',') if folder)}]"


def make_source(data: DictConfig) -> Any:
    """Return the source of text that cfg.data names; where activations go is not its business."""
    kept = [str(key) for key in data if key not in ("cache", "cache_dtype")]
    return make(OmegaConf.masked_copy(data, kept))


def _parsed(argument: str) -> Override:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        key, equals, value = argument.partition("=")
        example = f"\"{key}='{value}'\"" if equals else "tokens=1_000_000"
        _stop(
            f"cannot read the argument {argument}: write key=value, and put a value with unusual "
            f"characters in quotes twice, such as {example}."
        )


def _groups(name: str) -> set[str]:
    """Return the groups that a command's yaml file chooses options from."""
    defaults = OmegaConf.load(CONF / f"{name}.yaml").defaults
    keys = (str(key) for each in defaults if isinstance(each, DictConfig) for key in each)
    found = {key.removeprefix("optional ") for key in keys if not key.startswith("override ")}
    for whole in (each for each in defaults if isinstance(each, str) and each != "_self_"):
        found |= _groups(whole)  # another command's file, which this one starts from
    return found


def _options(override: Override, has: set[str] | None, name: str) -> list[str]:
    """Return the options that an argument chooses in a group; stop at one that is not there."""
    group, _, text = str(override.input_line).lstrip("+").partition("=")
    if has is not None and group not in has:
        there = ", ".join(sorted(has)) or "none"
        _stop(f"groupsae.{name} has no {group} to choose. Groups of options here: {there}.")
    if "(" in text:
        return []  # a function of Hydra's, such as choice(a,b)
    known = sorted(p.stem for p in (CONF / group).glob("*.yaml") if p.stem != "base")
    options = text.split(",")
    for option in options:
        if option not in (*known, "null"):
            near = _meant(difflib.get_close_matches(option, known, n=3))
            _stop(f"{group}={option} is unknown.{near} Valid: {', '.join(known)}.")
    return options


def _check_key(key: str, values: dict[str, Any]) -> None:
    """Stop if a configuration has no such key, with the keys that it has there."""
    node: Any = values
    path: list[str] = []
    for part in key.split("."):
        if isinstance(node, list):
            return
        if not isinstance(node, dict) or part not in node:
            break
        path.append(part)
        node = node[part]
    else:
        return
    where, last, every = ".".join(path), key.split(".")[-1], _dotted(values)
    valid = sorted(_named(node)) if isinstance(node, dict) else []
    close = [".".join([*path, name]) for name in difflib.get_close_matches(last, valid, n=3)]
    near = [known for known in every if known.split(".")[-1] == last][:3] or close
    near = near or difflib.get_close_matches(key, every, n=3, cutoff=0.75)
    there = f" Valid{' in ' + where if where else ''}: {', '.join(valid)}." if valid else ""
    # what is not in our yaml files is Lightning's own there
    more = f" Another option of Lightning's Trainer: +{key}=<value>." if where == "trainer" else ""
    _stop(f"{key} is unknown.{_meant(near)}{there}{more}")


def _named(node: dict[str, Any]) -> list[str]:
    return [key for key in node if not key.startswith("_")]


def _dotted(node: dict[str, Any], before: str = "") -> list[str]:
    found = []
    for key in _named(node):
        found.append(f"{before}{key}")
        if isinstance(node[key], dict):
            found += _dotted(node[key], f"{before}{key}.")
    return found


def _meant(near: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
