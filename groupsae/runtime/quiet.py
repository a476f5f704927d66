"""Keeps other libraries' chatter off the screen."""

import logging
import warnings
from pathlib import Path
from typing import Any

import transformers

_PACKAGE = Path(__file__).parents[1]
_python_format = warnings.formatwarning

EXPECTED = (
    ".*treespec, LeafSpec.*",  # lightning 2.6 on torch 2.13
    ".*does not have many workers.*",  # tokens are a memmap
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed.*",  # a run folder that was moved: its checkpoints came with it
    ".*broadcast_buffers.*",  # torch 2.13, no other way
    ".*sync_dist=True.*",  # our metrics are synchronised sums
    ".*dataloader is not resumable.*",  # ours is: StepSampler
    'install "ipywidgets"',  # rich, in a notebook: no bar moves then, and lines are printed
)


def quiet() -> None:
    """Silence other libraries; our output and warnings that matter remain."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for pattern in EXPECTED:
        warnings.filterwarnings("ignore", pattern)
    warnings.formatwarning = _format  # type: ignore[assignment]


def _format(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> str:
    """Return a warning of this package as a sentence, any other as Python formats it."""
    if Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _python_format(message, category, filename, *rest)
