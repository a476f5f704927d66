"""Runs a command with its arguments, and explains in a sentence what Hydra refuses of them."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, OverrideParseException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf

from groupsae.config.instantiate import CONF
from groupsae.config.values import LISTS, PLACES, TEXTS
from groupsae.runtime.commands import hydra_text
from groupsae.runtime.errors import UserError
from groupsae.runtime.output import never_fail_to_print

NOT_TEXT = ("true", "false", "null", "nan", "inf", "infinity")  # where they stand without quotes
_PART = re.compile(r"""'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^,]+""")  # of values with commas between


def start(name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run a command with the arguments of this process.

    What it raises for the user to read, and what Hydra cannot compose, ends it with one sentence
    on stderr and status 2.
    """
    never_fail_to_print()
    with one_sentence():
        sys.argv[1:] = read(sys.argv[1:], name)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints its errors itself, and exits

    @wraps(task)
    def run(cfg: DictConfig) -> Any:
        with one_sentence():
            return task(cfg)

    with one_sentence():
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(run)()
        except HydraException as error:
            raise _explained(error, sys.argv[1:], name) from error


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn a UserError into a sentence on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def read(arguments: Sequence[str], name: str) -> list[str]:
    """Return the arguments of a command as Hydra takes them.

    Paths and names (`TEXTS`) may have any characters, `~` is the home folder, and none of them is
    a number: `model.revision=143000` is the text "143000". With -m, commas separate the values
    of a sweep. `run=a,b` is a list. `tasks=` is short for that of the chosen part of the
    evaluation.

    >>> read(["run=outputs/a,outputs/b (1)"], "report")
    ['run=[outputs/a,"outputs/b (1)"]']
    >>> read(["-m", "model.revision=step1000,143000", "tokens=1,2"], "train")
    ['-m', 'model.revision=step1000,"143000"', 'tokens=1,2']
    >>> read(["evaluation=circuits", "tasks=[ioi,agreement]"], "evaluate")
    ['evaluation=circuits', 'evaluation.circuits.tasks=[ioi,agreement]']
    """
    sweep = bool({"-m", "--multirun"} & set(arguments))
    given = [_read(argument, name, sweep) for argument in with_parts(arguments)]
    if name == "train" and any(each.startswith("resume=") for each in given):
        # these are the resumed run's, whose keys the default model and text may not have
        return [f"++{each}" if each.startswith(PLACES) else each for each in given]
    return given


def with_parts(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `tasks=` as that of the part of the evaluation that has tasks."""
    chosen = [each for each in arguments if each.startswith("evaluation=")]
    names = {name for each in chosen for name in re.findall(r"[^][,\s='\"]+", each)}
    names = {name.removesuffix("-paper") for name in names}
    parts = [part for part in ("circuits", "harness") if part in names]
    if len(parts) != 1 and any(each.startswith("tasks=") for each in arguments):
        raise UserError(
            f"tasks= is for evaluation=circuits or evaluation=harness, and {len(parts) or 'none'} "
            "of them are chosen: choose one, or give evaluation.<part>.tasks=<names>."
        )
    return [
        f"evaluation.{parts[0]}.{each}" if each.startswith("tasks=") else each
        for each in arguments
    ]


def _read(argument: str, name: str, sweep: bool) -> str:
    key, _, value = argument.partition("=")
    if key.lstrip("+") not in TEXTS:
        return argument
    a_list = key in LISTS and value.startswith("[")
    sweeps = name == "train" and key != "resume" and not a_list  # with commas only there
    if key == "run" and value[:1] != "[" and not os.path.exists(os.path.expanduser(value)):
        folders = [_text(each) for each in _PART.findall(value)]
        return f"run=[{','.join(folders)}]" if len(folders) > 1 else f"run={''.join(folders)}"
    return f"{key}={_sweep(value, sweep) if sweeps else _text(value, key in LISTS)}"


def _sweep(value: str, multirun: bool) -> str:
    """Return the value of a key that can be swept over, each part as text."""
    parsed = _parsed_value(value)
    if os.path.exists(value):
        return _text(value)
    if isinstance(parsed, Sweep) and not (multirun and getattr(parsed, "simple_form", False)):
        return value  # a function, or commas without -m, which Hydra explains
    if multirun:
        return ",".join(_text(part) for part in _PART.findall(value))
    return _text(value)


def _text(value: str, lists: bool = False) -> str:
    """Return a value that Hydra reads as text: unchanged where it does so already."""
    # a quotation mark may come first: output='~/runs'
    value = re.sub(r"^(['\"]?)(~[^/'\"]*)", lambda m: m[1] + os.path.expanduser(m[2]), value)
    parsed = _parsed_value(value)
    if value in ("", "null", "???") or (lists and isinstance(parsed, list)):
        return value
    plain = parsed == value if os.path.exists(value) else isinstance(parsed, str)
    return value if plain else hydra_text(value)


def _parsed_value(value: str) -> Any:
    """Return a value as Hydra understands it; None if it does not."""
    try:
        return OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:
        return None


# ---- calls from Python --------------------------------------------------------------------


def composed(arguments: Sequence[str], name: str) -> DictConfig:
    """Return a command's configuration for the same arguments, without starting the command.

    Raises:
        UserError: an argument cannot be read, is unknown, or names several values.
    """
    arguments = read(arguments, name)
    try:
        for override in OverridesParser.create().parse_overrides(list(arguments)):
            if override.is_sweep_override():
                raise UserError(
                    f"{override.input_line} names several values, which is a sweep: call the "
                    "function once for each, or put a list in brackets."
                )
        with _our_files():
            return compose(name, overrides=arguments)
    except HydraException as error:
        raise _explained(error, arguments, name) from error


def arguments_of(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yield the arguments of a command that give these values, nested ones as dotted keys.

    >>> list(arguments_of({"groups": "count", "sae": {"k": 8}, "data.path": "my text/*.py"}))
    ['groups=count', 'sae.k=8', 'data.path="my text/*.py"']
    """
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from arguments_of(value, f"{before}{key}.")
        else:
            yield f"{before}{key}={_written(value)}"


def _written(value: Any) -> str:
    """Return a value as Hydra reads it on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(_written(each) for each in value)}]"
    if isinstance(value, Mapping):
        return "{}"
    if not isinstance(value, str | os.PathLike):  # a number, also of numpy
        return str(value)
    text = os.fspath(value)
    if re.fullmatch(r"[A-Za-z][\w.-]*", text) and text.lower() not in NOT_TEXT:
        return text
    return hydra_text(text)


@contextmanager
def _our_files() -> Iterator[None]:
    """Let Hydra compose from conf/. Its global state stays as it was: a notebook may use Hydra."""
    before = GlobalHydra.instance().hydra, VersionBase.instance().getbase()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra, VersionBase.instance().version_base = before


# ---- errors in arguments ------------------------------------------------------------------


def _explained(error: HydraException, arguments: Sequence[str], name: str) -> UserError:
    """Return Hydra's error as one sentence, with the nearest names of an unknown key."""
    sentence = " ".join(str(error).split()).partition(" Config search path")[0]
    if isinstance(error, OverrideParseException):
        return UserError(
            f"cannot read the argument {error.override}: write key=value (a run folder is "
            "run=<folder>), and put a value with unusual characters in quotes twice, such as "
            "\"key='value'\"."
        )
    unknown = re.match(r"Could not override '([^']+)'", sentence)
    if unknown is None:
        return UserError(sentence)
    key, every = unknown[1], list[str]()
    group, option = (*key.split("."), "")[:2]
    if (CONF / group / f"{option}.yaml").is_file():
        return UserError(f"{key} is unknown. It is of {group}={option}: choose that.")
    chosen = [each for each in arguments if (CONF / each.partition("=")[0]).is_dir()]
    with _our_files(), suppress(HydraException):  # options of the user's own, sweeps
        plain: Any = OmegaConf.to_container(compose(name, overrides=chosen))
        every = [each for each in _dotted(plain) if not key.startswith(f"{each}.")]
    same = [each for each in every if each.rpartition(".")[2] == key.rpartition(".")[2]]
    near = (same or difflib.get_close_matches(key, every, cutoff=0.75))[:3]
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    more = f" (Lightning's own are added: +{key}=<value>.)" if group == "trainer" else ""
    return UserError(f"{key} is unknown.{meant}{more}")


def _dotted(node: Mapping[Any, Any], before: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{before}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{before}{key}.")
