"""Language models for the tests: from a folder, or one that is in hand."""

from pathlib import Path
from typing import Any

from torch import nn

from groupsae.lm.blocks import find_blocks
from groupsae.lm.hooked import HookedLM
from groupsae.lm.load import FrozenLM


def frozen(name: Path | str, **options: Any) -> FrozenLM:
    """Return the model of a folder (or a name)."""
    return FrozenLM(name=str(name), **options)


def hooked(
    model: nn.Module, num_layers: int, hookpoint: str = "resid_post", d_model: int = 32
) -> HookedLM:
    """Return a model that is not loaded from a folder, with its hooks."""
    return HookedLM(
        model,
        find_blocks(model, num_layers),
        hookpoint=hookpoint,
        submodule=None,
        d_model=d_model,
        start_token=None,
        predicts=True,
    )
