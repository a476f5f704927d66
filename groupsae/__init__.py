"""Group-SAE: one sparse autoencoder per group of similar layers (arXiv 2410.21508).

Shape names in signatures: batch (rows), token, pos, block, layer, slot (a set of layers that a
row is drawn from), d_model, d_sae, k.
"""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("groupsae")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"

if TYPE_CHECKING:
    from groupsae.app.notebook import TrainedRun, angular_distances, evaluate, train
    from groupsae.grouping import Partition, amad, choose, partition
    from groupsae.interpretation.notebook import dashboard
    from groupsae.runtime.errors import UserError
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
    "Partition": "groupsae.grouping",
    "ReLU": "groupsae.sae.relu",
    "Suite": "groupsae.suite.suite",
    "TopK": "groupsae.sae.topk",
    "TrainedRun": "groupsae.app.notebook",
    "UserError": "groupsae.runtime.errors",
    "amad": "groupsae.grouping",
    "angular_distances": "groupsae.app.notebook",
    "choose": "groupsae.grouping",
    "dashboard": "groupsae.interpretation.notebook",
    "evaluate": "groupsae.app.notebook",
    "load_suite": "groupsae.suite.suite",
    "partition": "groupsae.grouping",
    "train": "groupsae.app.notebook",
}

__all__ = [
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "LayerSAE",
    "Matryoshka",
    "Partition",
    "ReLU",
    "Suite",
    "TopK",
    "TrainedRun",
    "UserError",
    "__version__",
    "amad",
    "angular_distances",
    "choose",
    "dashboard",
    "evaluate",
    "load_suite",
    "partition",
    "train",
]


if not TYPE_CHECKING:  # or a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """Import a public name on first use."""
        if name not in _HOMES:
            raise AttributeError(f"module 'groupsae' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, for completion in a notebook."""
    return __all__


class _Package(ModuleType):
    """Keeps `groupsae.train` the function: an import of the command's module would replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
