"""Reads others' files: whole, with the tensors that are expected, and never code."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from groupsae.files.reading import damaged, missing
from groupsae.runtime.errors import UserError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: the file is missing, cut short or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise missing(path) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def read_pickled(path: Path) -> Any:
    """Return the tensors and plain values of a file that torch.save wrote; no code is run.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch.save did not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise missing(path) from None
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path) and "Unsupported" not in str(error):
            raise damaged(path, "it is no file of torch.save") from error
        raise UserError(
            f"{path} holds more than tensors, and loading that would run code of whoever wrote "
            "it: it is not read. Save the state dict alone with torch.save(sae.state_dict(), ...)."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise damaged(path, error) from error


def take(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], where: Path
) -> dict[str, Tensor]:
    """Return the wanted tensors in float32.

    Args:
        tensors: all of a file.
        wanted: name -> shape.
        where: the file, for messages.

    Raises:
        UserError: one is missing or has another shape, or there are more.
    """
    missing, more = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or more:
        found = f"lacks the tensor {missing[0]}" if missing else f"has a tensor {more[0]} too many"
        raise UserError(
            f"{where} {found}: expected {', '.join(wanted)}, found {', '.join(sorted(tensors))}."
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{where}: the tensor {name} has shape {list(tensors[name].shape)}, but its "
                f"configuration wants {list(shape)}."
            )
    return {name: tensors[name].detach().float() for name in wanted}


def section(config: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    """Return an object within a configuration; an empty one if there is none.

    Raises:
        UserError: it is something else.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{where} has {key} = {value!r}; an object is expected.")
    return value or {}


def number(config: Mapping[str, Any], key: str, where: Path, *, latents: int | None = None) -> int:
    """Return a whole number above 0 of a configuration.

    Args:
        config: the configuration.
        key: of the number.
        where: the file, for messages.
        latents: that the number may not be above; None: no matter.

    Raises:
        UserError: it is missing, too large or something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where} has {key} = {value!r}; a whole number above 0 is expected.")
    if latents is not None and value > latents:
        raise UserError(f"{where} has {key} = {value}, more than its {latents} latents.")
    return value
