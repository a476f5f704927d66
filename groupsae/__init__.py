"""Group-SAE: one sparse autoencoder per group of similar layers (arXiv 2410.21508).

Shape names in signatures: batch (rows), token, pos, block, layer, slot (a set of layers that a
row is drawn from), d_model, d_sae, k.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("groupsae")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"

if TYPE_CHECKING:
    from groupsae.sae.batchtopk import BatchTopK
    from groupsae.sae.gated import Gated
    from groupsae.sae.jumprelu import JumpReLU
    from groupsae.sae.matryoshka import Matryoshka
    from groupsae.sae.relu import ReLU
    from groupsae.sae.topk import TopK
    from groupsae.suite.layer import LayerSAE
    from groupsae.suite.suite import Suite, load_suite

# public name -> its module, imported on first use: `import groupsae` stays light
_HOMES = {
    "BatchTopK": "groupsae.sae.batchtopk",
    "Gated": "groupsae.sae.gated",
    "JumpReLU": "groupsae.sae.jumprelu",
    "LayerSAE": "groupsae.suite.layer",
    "Matryoshka": "groupsae.sae.matryoshka",
    "ReLU": "groupsae.sae.relu",
    "Suite": "groupsae.suite.suite",
    "TopK": "groupsae.sae.topk",
    "load_suite": "groupsae.suite.suite",
}

__all__ = [
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "LayerSAE",
    "Matryoshka",
    "ReLU",
    "Suite",
    "TopK",
    "__version__",
    "load_suite",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'groupsae' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, for completion in a notebook."""
    return __all__
