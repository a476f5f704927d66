"""Batches of token blocks: of which split, in which order, from where on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader

from groupsae.data.loader import StepSampler, block_order, make_loader
from groupsae.data.packing import end_of_text
from groupsae.data.sizes import check_fills_a_step
from groupsae.data.sources import Source
from groupsae.data.splits import Split, document_numbers
from groupsae.data.tokens import Packing, TokenBlocks, load_token_blocks
from groupsae.lm.load import FrozenLM

# Of the sample that all runs are evaluated on, whatever their own seed; without it, the first
# blocks of the file would be those of a few documents.
HELDOUT_SEED = 0


class TokenBatches(L.LightningDataModule):
    """The part of a data module that knows of tokens only; what it is made of says the subclass.

    Attributes:
        blocks_seen: position in the data, over all ranks.
        device: that the batches go to.
    """

    lm: FrozenLM
    source: Source
    cache: Path
    packing: Packing
    blocks_per_step: int
    tokens_per_step: int
    num_steps: int
    heldout_tokens: int
    num_workers: int
    seed: int
    blocks_seen: int
    device: torch.device
    exchanges: object | None
    _blocks: TokenBlocks | None = None

    def prepare_data(self) -> None:
        """Pack the tokens once, on one process."""
        self.blocks  # noqa: B018

    @property
    def blocks(self) -> TokenBlocks:
        """Return the packed corpus, packing it first if need be."""
        if self._blocks is None:
            self._blocks = load_token_blocks(
                self.source,
                self.lm.tokenizer(),
                self.packing,
                self.cache / "tokens",
                vocab_size=self.lm.geometry.vocab_size,
            )
        return self._blocks

    def epochs(self) -> float:
        """Return how often the training split is read to fill the budget."""
        return self.num_steps * self.blocks_per_step / len(self.blocks.blocks["train"])

    def loader(
        self,
        split: Split,
        num_steps: int,
        seed: int | None,
        first_step: int = 0,
        whole: bool = False,
    ) -> DataLoader[Tensor]:
        """Return this rank's share of the batches of a split, or whole batches."""
        return make_loader(
            self.blocks.blocks[split],
            self.steps(split, num_steps, seed, first_step, whole),
            self.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def steps(
        self,
        split: Split,
        num_steps: int,
        seed: int | None,
        first_step: int = 0,
        whole: bool = False,
    ) -> StepSampler:
        """Return the blocks of each step that `loader` gives the tokens of."""
        trainer = None if whole else self.trainer
        return StepSampler(
            num_blocks=len(self.blocks.blocks[split]),
            blocks_per_step=self.blocks_per_step,
            num_steps=num_steps,
            seed=seed,
            first_step=first_step,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )

    def train_dataloader(self) -> Iterable[Any]:
        """Return the training batches from `blocks_seen` on."""
        first, whole = self.blocks_seen // self.blocks_per_step, self.exchanges is not None
        return self.loader("train", self.num_steps, self.seed, first, whole)

    def val_dataloader(self) -> Iterable[Any]:
        """Return the held-out batches of a validation."""
        return self.heldout(self.steps_for("heldout", self.heldout_tokens))

    def heldout(self, num_steps: int) -> DataLoader[Tensor]:
        """Return held-out batches: the same sample of blocks from the whole split every time."""
        return self.loader("heldout", num_steps, HELDOUT_SEED, whole=self.exchanges is not None)

    def heldout_documents(self, num_steps: int) -> Int64[np.ndarray, " block"]:
        """Return a number of the document that each block of `heldout` begins in."""
        blocks = self.blocks.blocks["heldout"][:, self.packing.prepend_bos :]
        numbers = document_numbers(blocks, end_of_text(self.lm.tokenizer()))
        order = block_order(len(blocks), HELDOUT_SEED, 0, num_steps * self.blocks_per_step)
        return numbers[order]

    def steps_for(self, split: Split, tokens: int | None) -> int:
        """Return the steps that hold at most `tokens` tokens of a split, at least one."""
        available = len(self.blocks.blocks[split]) // self.blocks_per_step
        check_fills_a_step(split, len(self.blocks.blocks[split]), self.blocks_per_step)
        wanted = available if tokens is None else max(1, tokens // self.tokens_per_step)
        return min(available, wanted)
