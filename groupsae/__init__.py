"""Group-SAE: one sparse autoencoder per group of similar layers (arXiv 2410.21508).

Shape names in signatures: batch (rows), token, pos, block, layer, slot (a set of layers that a
row is drawn from), d_model, d_sae, k.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("groupsae")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"

if TYPE_CHECKING:
    from groupsae.suite.suite import Suite, load_suite

__all__ = ["Suite", "__version__", "load_suite"]


def __getattr__(name: str) -> Any:
    """Import the loading functions on first use: `import groupsae` stays light."""
    if name in {"Suite", "load_suite"}:
        from groupsae.suite import suite

        return getattr(suite, name)
    raise AttributeError(name)
