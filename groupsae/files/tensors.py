"""Tensors in files: safetensors, with names and shapes checked."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from groupsae.files.reading import damaged, missing
from groupsae.runtime.errors import UserError


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: the file is missing, truncated or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise missing(file) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(file, error) from error


def take(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], file: Path
) -> dict[str, Tensor]:
    """Return the tensors of a file in float32, after a check of names and shapes.

    Raises:
        UserError: one is missing or has another shape, or there are more.
    """
    lacking, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if lacking or extra:
        fault = f"lacks the tensor {lacking[0]}" if lacking else f"has an extra tensor {extra[0]}"
        raise UserError(
            f"{file} {fault}: expected {', '.join(wanted)}, found {', '.join(sorted(tensors))}."
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{file}: the tensor {name} has shape {list(tensors[name].shape)}, but its "
                f"configuration requires {list(shape)}."
            )
    return {name: tensors[name].detach().float() for name in wanted}
