"""Checks of an SAE's arguments; `name` is the key under `sae` on the command line."""

import math
from typing import TypeGuard

from groupsae.runtime.errors import UserError


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_share(name: str, value: object) -> None:
    """Raise UserError unless a value is a share, 0 to 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise UserError(f"sae.{name} is {value!r}; it must be a number from 0 to 1.")


def check_positive(**values: object) -> None:
    """Raise UserError unless all values are above 0."""
    for name, value in values.items():
        if not is_number(value) or not value > 0:
            raise UserError(f"sae.{name} is {value!r}; it must be a number above 0.")


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Raise UserError unless a value is an integer from 1 to `most`, the number of latents."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= (most or value):
        return
    allowed = "1 or more" if most is None else f"between 1 and the {most} latents"
    raise UserError(f"sae.{name} is {value!r}; it must be an integer, {allowed}.")
