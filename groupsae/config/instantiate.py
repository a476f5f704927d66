"""Which classes a configuration may name, and the objects that it describes.

A configuration is data, perhaps a stranger's: it can build only what our own yaml files name.
"""

import importlib
import inspect
import os
import re
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from groupsae.runtime.errors import UserError

_INSTALLED = Path(__file__).parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "conf"
VARIABLE = "GROUPSAE_TARGETS"  # of the environment: classes of the user's own, with commas
# in addition to those of the yaml files: model.load.quantization_config
MORE = ("transformers.BitsAndBytesConfig",)
_TARGET = re.compile(r"^\s*_target_: ((?:groupsae|lightning)\.[\w.]+)", re.MULTILINE)


def allowed() -> frozenset[str]:
    """Return the import paths that `_target_` may be."""
    own = (name.strip() for name in os.environ.get(VARIABLE, "").split(","))
    return _of_our_files() | {name for name in own if name}


@cache
def _of_our_files() -> frozenset[str]:
    texts = (file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml"))
    return frozenset(MORE).union(*(_TARGET.findall(text) for text in texts))


def check_targets(values: object, where: str = "") -> None:
    """Check the class names in a configuration, before anything is built.

    The values are plain: a target that is put together by interpolation is refused.

    Raises:
        UserError: a class is named that is not allowed, or a key that Hydra would take for an
            instruction.
    """
    if isinstance(values, list | tuple):
        for number, value in enumerate(values):
            check_targets(value, f"{where}[{number}]")
    if not isinstance(values, Mapping):
        return
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key == "_target_" and not (isinstance(value, str) and value in allowed()):
            raise UserError(
                f"{name} is {value!r}, which a configuration may not name: it could run any code. "
                f"A class of your own is allowed by the environment variable {VARIABLE}, such as "
                f"{VARIABLE}=my_package.MyClass."
            )
        if key == "_partial_" and not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}; it must be true or false.")
        if str(key).startswith("_") and key not in ("_target_", "_partial_"):
            raise UserError(f"{name} is not an option: leave it out.")
        check_targets(value, name)


def make(cfg: Any, **more: Any) -> Any:
    """Return the object that a node of the configuration describes, built from plain values.

    The node has `_target_` and arguments, to which `more` is added, or holds such nodes.

    Raises:
        UserError: a class is not allowed, or has no such argument; or its constructor refuses one.
    """
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_targets(cfg)
    return _built({**cfg, **more} if more else cfg)


def _built(values: Any) -> Any:
    if isinstance(values, list):
        return [_built(value) for value in values]
    if not isinstance(values, dict):
        return values
    arguments = {k: _built(v) for k, v in values.items() if k not in ("_target_", "_partial_")}
    if "_target_" not in values:
        return arguments
    target: str = values["_target_"]
    module, _, name = target.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{target} cannot be imported: {error}.") from error
    later = values.get("_partial_", False)
    try:
        signature = inspect.signature(made)
        (signature.bind_partial if later else signature.bind)(**arguments)
    except TypeError as error:
        raise UserError(f"{target}: {error}.") from error
    return partial(made, **arguments) if later else made(**arguments)
