"""The stream that the fits of this folder read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def make_data(
    tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Return a function of groups and steps that returns a data module of a small model."""
    from tests.helpers.fits import tiny_data

    cache = tmp_path_factory.mktemp("cache")
    return lambda groups, steps=6, **changes: tiny_data(
        tiny_lm, tiny_text, cache, groups, steps, **changes
    )
