"""The text that latents are looked at on: parts of blocks, and where their documents end."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.data.activations import HELDOUT_SEED, ActivationDataModule
from groupsae.data.loader import block_order
from groupsae.data.packing import Split
from groupsae.interpretation.firings import WINDOW
from groupsae.lm.hooked import read_after
from groupsae.runtime.errors import UserError

PART = 32_768  # tokens of a part, about: what is found in it is sorted together
TEXTS: tuple[Split, Split] = ("train", "heldout")  # explanations are made on one, scored on one
EXPLAIN, SCORE = 0, 1


class Part(NamedTuple):
    """Some blocks of tokens of one of the texts."""

    number: int  # of the part, from 0, over both texts
    text: int  # `EXPLAIN` or `SCORE`
    first: int  # position of its first token; positions count through both texts
    tokens: Int[Tensor, "block pos"]  # tokens to run the model on


class Text:
    """Blocks of the training split for explanations, and held-out blocks to score them on.

    Both are a fixed sample of their split, the same for every seed, so that runs are compared on
    the same text. A position is block * context + token, in the order of the sample.

    `explain` tokens of the training split are read, and `score` held-out ones, at most.

    Raises:
        UserError: a text is shorter than a window.
    """

    def __init__(self, data: ActivationDataModule, explain: int, score: int) -> None:
        self.data, self.context = data, data.packing.context
        blocks, forward = data.blocks.blocks, data.blocks_per_forward
        # complete forwards: the model's numbers do not depend on the number of processes
        self.size = max(1, PART // self.context // forward) * forward
        self.chosen = [
            block_order(len(blocks[split]), HELDOUT_SEED, 0, min(len(blocks[split]), count))
            for split, count in zip(
                TEXTS, (explain // self.context, score // self.context), strict=True
            )
        ]
        if self.context < WINDOW or not all(map(len, self.chosen)):
            raise UserError(
                f"interpretation.explain_tokens={explain:,} and interpretation.score_tokens="
                f"{score:,} give {len(self.chosen[0])} and {len(self.chosen[1])} blocks of "
                f"{self.context} tokens: latents are shown in windows of {WINDOW} tokens, so "
                f"both texts need a block, of at least {WINDOW} tokens."
            )

    @property
    def tokens(self) -> list[int]:
        """Return the number of tokens of each text."""
        return [len(chosen) * self.context for chosen in self.chosen]

    def parts(self, first: int = 0, step: int = 1) -> Iterator[Part]:
        """Yield every `step`-th part, from the given one on."""
        number = block = 0
        for text, chosen in enumerate(self.chosen):
            for start in range(0, len(chosen), self.size):
                wanted = chosen[start : start + self.size]
                if number >= first and (number - first) % step == 0:
                    tokens = self.data.tokens(TEXTS[text], wanted.tolist())
                    yield Part(number, text, block * self.context, tokens)
                number, block = number + 1, block + len(wanted)

    @property
    def num_parts(self) -> int:
        """Return the number of parts of both texts."""
        return sum(-(-len(chosen) // self.size) for chosen in self.chosen)

    def heldout_documents(self) -> Int[np.ndarray, " block"]:
        """Return a number of the document in which each block of the score text begins."""
        return self.data.documents("heldout")[self.chosen[SCORE]]

    def read(self) -> Int[np.ndarray, "block pos"]:
        """Return the tokens of both texts, as the model reads them."""
        start = self.data.lm.start_token
        parts = [
            read_after(start, self.data.tokens(split, chosen.tolist()))
            for split, chosen in zip(TEXTS, self.chosen, strict=True)
        ]
        return torch.cat(parts).int().numpy()


def document_bounds(
    read: Int[Tensor, "block pos"], end: int | None
) -> tuple[Int[Tensor, "token"], Int[Tensor, "token"]]:
    """Return where the document of each token begins and ends (exclusive), within its block.

    Documents end with the token `end`; places count through the blocks. None: every block is one
    document.

    >>> starts, ends = document_bounds(torch.tensor([[5, 0, 6, 7]]), end=0)
    >>> starts.tolist(), ends.tolist()
    ([0, 0, 2, 2], [2, 2, 4, 4])
    """
    places = torch.arange(read.numel(), device=read.device).view(read.shape)
    is_last = torch.zeros_like(read, dtype=torch.bool) if end is None else read == end
    is_last[:, -1] = True
    is_first = torch.ones_like(is_last)
    is_first[:, 1:] = is_last[:, :-1]
    starts = torch.where(is_first, places, 0).flatten().cummax(0).values
    far = read.numel()
    ends = torch.where(is_last, places + 1, far).flatten().flip(0).cummin(0).values.flip(0)
    return starts, ends
