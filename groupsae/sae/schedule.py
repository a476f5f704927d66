"""How sparsity sets in over the training, and what an SAE's numbers may be."""

import math
from typing import TypeGuard

from groupsae.runtime.errors import UserError


def ramp(start: float, end: float, warmup: float, progress: float) -> float:
    """Return the value after a share of the training: start to end over `warmup`, linearly."""
    if progress >= warmup:
        return end
    return start + (end - start) * progress / warmup


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_share(name: str, value: object) -> None:
    """Raise UserError unless a value of an SAE is a share, 0 to 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise UserError(f"sae.{name} is {value!r}; it must lie between 0 and 1.")


def check_positive(**values: object) -> None:
    """Raise UserError unless all values of an SAE are above zero."""
    for name, value in values.items():
        if not is_number(value) or not value > 0:
            raise UserError(f"sae.{name} is {value!r}; it must be a number above 0.")


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Raise UserError unless a value of an SAE is a whole number from 1 to `most` latents."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if whole and (most is None or value <= most):  # type: ignore[operator]
        return
    allowed = "at least 1" if most is None else f"between 1 and the {most} latents"
    raise UserError(f"sae.{name} is {value!r}; it must be a whole number, {allowed}.")
