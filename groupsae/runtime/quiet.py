"""What reaches the user's screen besides our own words."""

import logging
import warnings
from pathlib import Path

import transformers

_with_place = warnings.formatwarning

EXPECTED = (
    ".*treespec, LeafSpec.*",  # lightning 2.6 on torch 2.13
    ".*does not have many workers.*",  # tokens are a memmap
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*broadcast_buffers.*",  # torch 2.13, no other way
    ".*sync_dist=True.*",  # our metrics are synchronised sums
    ".*dataloader is not resumable.*",  # ours is: StepSampler
)


def quiet() -> None:
    """Keep third-party chatter off the screen: what remains is ours or a warning that matters."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for pattern in EXPECTED:
        warnings.filterwarnings("ignore", pattern)
    warnings.formatwarning = _formatted


def _formatted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Return a warning of ours as a sentence, any other with its place, as Python does."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {message}\n"
    return _with_place(message, category, filename, lineno, line)
