"""Checks of an SAE's arguments; `name` is the key under `sae` on the command line."""

import math
from typing import Any, TypeGuard

from groupsae.runtime.errors import UserError


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_share(name: str, value: object) -> None:
    """Raise UserError unless a value is a share, 0 to 1."""
    _check(name, value, is_number(value) and 0 <= value <= 1, "a number from 0 to 1")


def check_positive(**values: object) -> None:
    """Raise UserError unless all values are above 0."""
    for name, value in values.items():
        _check(name, value, is_number(value) and value > 0, "a number above 0")


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Raise UserError unless a value is an integer from 1 to `most`, the number of latents."""
    limit = math.inf if most is None else most
    fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit
    end = "" if most is None else f" to the {most} latents"
    _check(name, value, fits, f"an integer from 1 up{end}")


def _check(name: str, value: Any, fits: bool, allowed: str) -> None:
    if not fits:
        raise UserError(f"sae.{name} is {value!r}; it must be {allowed}.")
