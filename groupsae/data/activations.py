"""Tokens in, activations out: the DataModule that holds the language model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor
from torch.utils.data import DataLoader

from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.batch import ActivationBatch
from groupsae.data.filters import TokenFilter, check_filters
from groupsae.data.loader import StepSampler, block_order, make_loader
from groupsae.data.packing import end_of_text
from groupsae.data.rows import draw_rows
from groupsae.data.sources import Source
from groupsae.data.splits import SPLITS, Split, document_numbers
from groupsae.data.tokens import Packing, TokenBlocks, load_token_blocks
from groupsae.errors import UserError
from groupsae.lm.hooked import HookedLM
from groupsae.lm.load import FrozenLM

LEAST_TEXT = 20_000_000  # tokens
# Of the sample that all runs are evaluated on, whatever their own seed; without it, the first
# blocks of the file would be those of a few documents.
HELDOUT_SEED = 0


class ActivationDataModule(L.LightningDataModule):
    """Streams activations of a frozen language model, at its hookpoint.

    Token blocks travel through an ordinary loader; the model runs on the device in
    `on_after_batch_transfer`, one truncated forward for all layers, and only the drawn rows are
    kept.

    The position in the data is one integer, `blocks_seen` over all ranks; order and draws are
    functions of it, so a resumed run sees exactly what the undisturbed one would.

    Args:
        lm: the language model.
        source: where the text comes from.
        cache: folder for packed tokens.
        context: tokens in a block.
        heldout_fraction: share of the documents that is only evaluated on.
        calibration_fraction: share for layer distances and norm factors.
        prepend_bos: start every block with BOS (the paper does not).
        exclude_special_tokens: leave rows at BOS, EOS and padding out of everything.
        skip_positions: leave the first so many positions of each block out, too.
        max_norm_ratio: and rows whose norm is more than so many times their block's median.
        max_tokens: read no more text than this; None reads 1.25 times the training budget, at
            least 20 million tokens (so that small budgets share one packed corpus).
        blocks_per_step: blocks in an SAE step over all ranks.
        blocks_per_forward: blocks in one forward of the language model; bounds its memory.
        tokens: training budget, tokens per SAE.
        heldout_tokens: tokens of one validation.
        num_workers: loader processes.
        seed: of shuffle and layer draws.
    """

    def __init__(
        self,
        *,
        lm: FrozenLM,
        source: Source,
        cache: str,
        context: int,
        heldout_fraction: float,
        calibration_fraction: float,
        prepend_bos: bool,
        exclude_special_tokens: bool,
        skip_positions: int,
        max_norm_ratio: float | None,
        max_tokens: int | None,
        blocks_per_step: int,
        blocks_per_forward: int,
        tokens: int,
        heldout_tokens: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if context > lm.geometry.context:
            raise UserError(
                f"stream.context is {context}, but {lm.name} reads at most "
                f"{lm.geometry.context} tokens."
            )
        if tokens < blocks_per_step * context:
            raise UserError(
                f"tokens={tokens:,} is less than one step of stream.blocks_per_step="
                f"{blocks_per_step} blocks of {context} tokens: raise it, or lower the step."
            )
        self.lm, self.source, self.cache = lm, source, Path(cache)
        self.packing = Packing(
            context=context,
            heldout_fraction=heldout_fraction,
            calibration_fraction=calibration_fraction,
            prepend_bos=prepend_bos,
            max_tokens=max_tokens or max(LEAST_TEXT, tokens * 5 // 4),
        )
        check_filters(skip_positions, max_norm_ratio, context)
        self.exclude_special_tokens = exclude_special_tokens
        self.skip_positions, self.max_norm_ratio = skip_positions, max_norm_ratio
        self.blocks_per_step, self.blocks_per_forward = blocks_per_step, blocks_per_forward
        self.heldout_tokens, self.num_workers, self.seed = heldout_tokens, num_workers, seed
        self.tokens_per_step = blocks_per_step * context
        self.num_steps = tokens // self.tokens_per_step
        self.slots: list[list[int]] = []
        self.blocks_seen = 0
        self.stopwatch = Stopwatch()  # of the language model's forwards in training
        self._blocks: TokenBlocks | None = None

    # ---- data ---------------------------------------------------------------------------

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

    def setup(self, stage: str) -> None:
        """Check that every split fills a step; load the model onto this process's device."""
        for split in SPLITS:
            self.steps_for(split, None)
        if not hasattr(self, "hooked"):
            device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
            self.use(self.lm.load(device), device)

    def use(self, hooked: HookedLM, device: torch.device) -> None:
        """Run this copy of the language model, with or without its head, and no other."""
        self.hooked, self.model, self.device = hooked, hooked.model, device
        special = self.lm.tokenizer().all_special_ids
        if hooked.start_token is not None:
            special = [*special, hooked.start_token]
        self.special_ids = torch.tensor(special, device=device, dtype=torch.int64)

    @property
    def filters(self) -> TokenFilter:
        """Return which tokens count."""
        special = self.special_ids if self.exclude_special_tokens else None
        return TokenFilter(special, self.skip_positions, self.max_norm_ratio)

    def described(self) -> dict[str, Any]:
        """Return what decides the activations, but for weights and text, as plain values."""
        return {
            **self.lm.described(),
            "context": self.packing.context,
            "prepend_bos": self.packing.prepend_bos,
            "exclude_special_tokens": self.exclude_special_tokens,
            "skip_positions": self.skip_positions,
            "max_norm_ratio": self.max_norm_ratio,
        }

    def loader(
        self, split: Split, num_steps: int, seed: int | None, first_step: int = 0
    ) -> DataLoader[Tensor]:
        """Return this rank's share of the batches of a split."""
        sampler = StepSampler(
            num_blocks=len(self.blocks.blocks[split]),
            blocks_per_step=self.blocks_per_step,
            num_steps=num_steps,
            seed=seed,
            first_step=first_step,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        return make_loader(self.blocks.blocks[split], sampler, self.num_workers)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the training batches from `blocks_seen` on."""
        return self.loader(
            "train", self.num_steps, self.seed, first_step=self.blocks_seen // self.blocks_per_step
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the held-out batches of a validation."""
        return self.heldout(self.steps_for("heldout", self.heldout_tokens))

    def heldout(self, num_steps: int) -> DataLoader[Tensor]:
        """Return held-out batches: the same sample of blocks from the whole split every time."""
        return self.loader("heldout", num_steps, HELDOUT_SEED)

    def heldout_documents(self, num_steps: int) -> Int64[np.ndarray, " block"]:
        """Return a number of the document that each block of `heldout` begins in."""
        blocks = self.blocks.blocks["heldout"][:, self.packing.prepend_bos :]
        numbers = document_numbers(blocks, end_of_text(self.lm.tokenizer()))
        order = block_order(len(blocks), HELDOUT_SEED, 0, num_steps * self.blocks_per_step)
        return numbers[order]

    def steps_for(self, split: Split, tokens: int | None) -> int:
        """Return the steps that hold at most `tokens` tokens of a split, at least one."""
        available = len(self.blocks.blocks[split]) // self.blocks_per_step
        if available == 0:
            raise UserError(
                f"the {split} split has {len(self.blocks.blocks[split])} blocks, less than one "
                f"step of {self.blocks_per_step}: give more text, or lower stream.blocks_per_step"
                + (f" or raise stream.{split}_fraction." if split != "train" else ".")
            )
        wanted = available if tokens is None else max(1, tokens // self.tokens_per_step)
        return min(available, wanted)

    # ---- activations --------------------------------------------------------------------

    def set_slots(self, groups: list[list[int]]) -> None:
        """Choose the sets of layers that training batches draw from, one row each."""
        self.slots = groups

    def on_after_batch_transfer(
        self, batch: Tensor, dataloader_idx: int
    ) -> ActivationBatch | Iterator[ActivationBatch]:
        """Turn a batch of tokens into activations.

        A validation batch shows every used layer, so it comes in parts of `blocks_per_forward`.
        """
        assert self.trainer is not None
        if not self.trainer.training:
            return self.every_layer(batch, self.used_layers())
        share = self.blocks_per_step // self.trainer.world_size
        first = self.blocks_seen + self.trainer.global_rank * share
        self.blocks_seen += self.blocks_per_step
        self.stopwatch.start(batch.device)
        made = self.activations(batch, self.slots, first * self.packing.context)
        self.stopwatch.stop()
        return made

    def used_layers(self) -> list[int]:
        """Return every layer that some slot draws from, sorted."""
        return sorted({layer for slot in self.slots for layer in slot})

    def activations(
        self, tokens: Int[Tensor, "block pos"], slots: list[list[int]], first_position: int = 0
    ) -> ActivationBatch:
        """Return one row per slot and token; `first_position` is that of the first in the run."""
        return draw_rows(
            self.hooked,
            self.filters,
            tokens,
            slots,
            seed=self.seed,
            first_position=first_position,
            blocks_per_forward=self.blocks_per_forward,
        )

    def calibration_batches(self, tokens: int) -> Iterator[ActivationBatch]:
        """Yield every layer's activations over this rank's share of the calibration split."""
        every = list(range(self.lm.geometry.num_layers))
        for batch in self.loader("calibration", self.steps_for("calibration", tokens), None):
            yield from self.every_layer(batch.to(self.device), every)

    def every_layer(
        self, tokens: Int[Tensor, "block pos"], layers: list[int]
    ) -> Iterator[ActivationBatch]:
        """Yield all activations of `layers`, one slot each, `blocks_per_forward` at a time."""
        for part in tokens.split(self.blocks_per_forward):
            yield self.activations(part, [[layer] for layer in layers])

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, and what it is a position in."""
        return {
            "blocks_seen": self.blocks_seen,
            "tokens_key": self.blocks.key,
            "seconds": self.stopwatch.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            UserError: the text has changed since.
        """
        if state_dict["tokens_key"] != self.blocks.key:
            raise UserError(
                f"this run was trained on packed text {state_dict['tokens_key']}, but data now "
                f"gives {self.blocks.key}: the source, tokenizer or packing has changed. Start "
                "a new run, or bring back the old text."
            )
        self.blocks_seen = state_dict["blocks_seen"]
        self.stopwatch.seconds = state_dict["seconds"]
