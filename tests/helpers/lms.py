"""Language models as the tests want them: from a folder with the defaults of conf, or in hand."""

from pathlib import Path
from typing import Any

from torch import nn

from groupsae.lm.blocks import find_blocks
from groupsae.lm.hooked import HookedLM
from groupsae.lm.load import FrozenLM

DEFAULTS: dict[str, Any] = {
    "revision": None,
    "dtype": "float32",
    "hookpoint": "resid_post",
    "stack": None,
    "blocks_path": None,
    "submodule": None,
    "compile": False,
    "load": {},
}


def frozen(name: Path | str, **changes: Any) -> FrozenLM:
    """Return the model of a folder (or a name), with conf/model/hf.yaml's values but for some."""
    return FrozenLM(**{"name": str(name), **DEFAULTS, **changes})


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
