"""Whether the language model suits its text: its loss against guessing by frequency."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from groupsae.data.activations import ActivationDataModule
from groupsae.evaluation.effect import CleanPredictions

BLOCKS, COUNTED = 8, 2**20  # blocks that the model reads; tokens whose frequencies count


class Losses(NamedTuple):
    """In nats per token.

    Attributes:
        cross_entropy: of the unchanged model on the first calibration blocks.
        unigram_entropy: -sum_v p_v ln p_v, with the frequencies p of the tokens of the training
            text: the loss of a model that knows nothing else.
    """

    cross_entropy: float
    unigram_entropy: float

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "Losses | None":
        """Return the losses among the arrays of a file; None if it has none."""
        return cls(*(float(stored[n]) for n in cls._fields)) if cls._fields[0] in stored else None

    def warning(self, model: str, prepend_bos: bool) -> str | None:
        """Return a warning if the model's loss is implausible for its text."""
        if self.cross_entropy <= self.unigram_entropy:
            return None
        bos = "" if prepend_bos else ", or it needs BOS (stream.prepend_bos=true)"
        return (
            f"the cross-entropy of {model} on this text is {self.cross_entropy:.2f} nats a token, "
            f"above the {self.unigram_entropy:.2f} of guessing by the tokens' frequencies. Its "
            f"weights are random or damaged, its tokenizer is another model's, it does not know "
            f"this kind of text{bos}: SAEs of it would show little."
        )


@torch.no_grad()
def measure_losses(data: ActivationDataModule, device: torch.device) -> Losses | None:
    """Return the losses; None if the model predicts no next token. Loads it with its head."""
    lm = data.lm.load_with_head(device)
    if not lm.predicts:
        return None
    ce = predictions = 0.0
    blocks = list(range(min(BLOCKS, len(data.blocks.blocks["calibration"]))))
    for tokens in data.tokens("calibration", blocks).to(device).split(data.blocks_per_forward):
        read = lm.read(tokens)
        logits = lm.output(lm.run(lm.inputs(tokens), [], lambda *_: None, stop=False))
        clean = CleanPredictions(logits, read, data.filters.tokens(read))
        ce += float(clean.ce.sum())
        predictions += float(clean.predictions.sum())
    counts = np.bincount(data.blocks.blocks["train"][: COUNTED // data.packing.context].ravel())
    share = counts[counts > 0] / counts.sum()
    return Losses(ce / max(predictions, 1), float(-(share * np.log(share)).sum()))
