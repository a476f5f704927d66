"""Tokens in, activations out: the DataModule that holds the language model."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.batch import ActivationBatch
from groupsae.data.drawn import DrawnTokens
from groupsae.data.exchange import Exchange
from groupsae.data.filters import check_filters
from groupsae.data.rows import draw_rows
from groupsae.data.sizes import check_sizes
from groupsae.data.sources import Source
from groupsae.data.splits import SPLITS
from groupsae.data.spread import SpreadTokens, exchange_rows, travelling_dtype
from groupsae.data.store.batches import StoredBatches, StoredParts
from groupsae.data.store.rows import StoredRows
from groupsae.data.tokens import Packing
from groupsae.lm.hooked import HookedLM
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError

LEAST_TEXT = 20_000_000  # tokens

Drawn = DrawnTokens | SpreadTokens


class ActivationDataModule(StoredBatches):
    """Streams activations of a frozen language model, at its hookpoint.

    Token blocks travel through an ordinary loader. What can be decided without the model is
    decided on the host, in `on_before_batch_transfer`; the model runs on the device in
    `on_after_batch_transfer`, one truncated forward for all layers, and only the drawn rows are
    kept. Nothing of it waits for the device, but where stream.max_norm_ratio lets norms decide
    which rows count: then `ActivationBatch.rows` waits for their number.

    The position in the data is one integer, `blocks_seen` over all ranks; order and draws are
    functions of it, so a resumed run sees exactly what the undisturbed one would.

    With `keep_in`, activations are written to a store once and read from there: rows come with the
    batch, and no language model runs.

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
        check_sizes(context, lm, tokens, blocks_per_step, blocks_per_forward)
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
        self.exchanges: tuple[Exchange, Exchange] | None = None  # none: rows stay where they are
        self.blocks_seen = 0
        self._hooked: HookedLM | None = None
        self.device = torch.device("cpu")
        self.stopwatch = Stopwatch()  # of the language model's forwards in training

    # ---- data ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that every split fills a step; load the model onto this process's device."""
        for split in SPLITS:
            self.steps_for(split, None)
        if self._hooked is None:
            self.device = self.trainer.strategy.root_device if self.trainer else self.device
            if not self.is_stored:
                self.hooked  # noqa: B018

    @property
    def hooked(self) -> HookedLM:
        """Return the language model, loaded if it is not yet."""
        if self._hooked is None:
            self.use(self.lm.load(self.device), self.device)
        assert self._hooked is not None
        return self._hooked

    @property
    def model(self) -> torch.nn.Module:
        """Return the language model as transformers has it."""
        return self.hooked.model

    def use(self, hooked: HookedLM, device: torch.device) -> None:
        """Run this copy of the language model, with or without its head, and no other."""
        self._hooked, self.device = hooked, device

    def release(self) -> None:
        """Let go of the language model; it is loaded again when it is needed."""
        self._hooked = None

    def described(self) -> dict[str, Any]:
        """Return what decides the activations, but for weights and text, as plain values."""
        return {
            **self.lm.described(),
            "context": self.packing.context,
            "prepend_bos": self.packing.prepend_bos,
            "exclude_special_tokens": self.exclude_special_tokens,
            "skip_positions": self.skip_positions,
            "max_norm_ratio": self.max_norm_ratio,
            **({"stored": self.stored_dtype} if self.is_stored else {}),
        }

    # ---- activations --------------------------------------------------------------------

    def exchange(self, training: Exchange, validation: Exchange) -> None:
        """Send rows to the processes that need them, in training and in validation.

        Args:
            training: of the slots.
            validation: of layers.
        """
        self.exchanges = training, validation
        if self.is_stored:
            self.travelling = self.store.layout.dtype
            return
        sample = torch.from_numpy(self.blocks.blocks["train"][:1, :2].astype("int64"))
        self.travelling = travelling_dtype(self.hooked, sample.to(self.device), self.used_layers())

    def train_dataloader(self) -> Iterable[Any]:
        """Return the training batches from `blocks_seen` on."""
        return self.stored_training() if self.is_stored else super().train_dataloader()

    def val_dataloader(self) -> Iterable[Any]:
        """Return the held-out batches of a validation."""
        if not self.is_stored:
            return super().val_dataloader()
        return self.stored_heldout(self.steps_for("heldout", self.heldout_tokens))

    def on_before_batch_transfer(
        self, batch: Tensor | StoredRows | StoredParts, dataloader_idx: int
    ) -> Drawn | StoredRows | StoredParts | list[DrawnTokens] | list[SpreadTokens]:
        """Decide on the host what a batch of tokens will show.

        A validation batch shows every used layer, so it comes in parts of `blocks_per_forward`.
        """
        if isinstance(batch, StoredRows | StoredParts):  # decided when it was read
            return batch
        assert self.trainer is not None
        if self.exchanges is not None:
            return self.spread(batch, self.blocks_seen, training=self.trainer.training)
        if not self.trainer.training:
            slots = [[layer] for layer in self.used_layers()]
            return [self.drawn(part, slots) for part in batch.split(self.blocks_per_forward)]
        share = self.blocks_per_step // self.trainer.world_size
        first = self.blocks_seen + self.trainer.global_rank * share
        return self.drawn(batch, self.slots, first * self.packing.context)

    def on_after_batch_transfer(
        self, batch: Drawn | list[Drawn] | StoredRows | StoredParts, dataloader_idx: int
    ) -> ActivationBatch | Iterator[ActivationBatch]:
        """Turn what was drawn into activations."""
        if isinstance(batch, StoredParts):
            exchange = None if self.exchanges is None else self.exchanges[1]
            return (rows.to(self.device).batch(exchange) for rows in batch.rows())
        if isinstance(batch, list):
            slots = [[layer] for layer in self.used_layers()]
            return (self._made(part, slots, training=False) for part in batch)
        self.blocks_seen += self.blocks_per_step
        if isinstance(batch, StoredRows):
            return batch.batch(None if self.exchanges is None else self.exchanges[0])
        self.stopwatch.start(batch.layers.device)
        made = self._made(batch, self.slots, training=True)
        self.stopwatch.stop()
        return made

    def _made(self, drawn: Drawn, slots: list[list[int]], *, training: bool) -> ActivationBatch:
        if isinstance(drawn, DrawnTokens):
            return self.shown(drawn, slots)
        assert self.exchanges is not None
        return exchange_rows(
            self.hooked,
            self.filters,
            drawn,
            self.exchanges[0 if training else 1],
            dtype=self.travelling,
            blocks_per_forward=self.blocks_per_forward,
        )

    def shown(self, drawn: DrawnTokens, slots: list[list[int]]) -> ActivationBatch:
        """Return the activations of tokens whose draws from `slots` lie on the device."""
        return draw_rows(
            self.hooked, self.filters, drawn, slots, blocks_per_forward=self.blocks_per_forward
        )

    def activations(
        self, tokens: Int[Tensor, "block pos"], slots: list[list[int]], first_position: int = 0
    ) -> ActivationBatch:
        """Return one row per slot and token; `first_position` is that of the first in the run.

        Tokens that are on the device already come back to the host first.
        """
        return self.shown(self.drawn(tokens.cpu(), slots, first_position).to(self.device), slots)

    def calibration_batches(self, tokens: int) -> Iterator[ActivationBatch]:
        """Yield every layer's activations over this rank's share of the calibration split.

        They come from the store if all of them are there, see `fill_calibration`.
        """
        steps = self.steps_for("calibration", tokens)
        every = list(range(self.lm.geometry.num_layers))
        if self.has_calibration(steps):
            yield from self.stored_calibration(steps)
            return
        for batch in self.loader("calibration", steps, None):
            yield from self.every_layer(batch, every)

    def every_layer(
        self, tokens: Int[Tensor, "block pos"], layers: list[int]
    ) -> Iterator[ActivationBatch]:
        """Yield all activations of `layers`, one slot each, `blocks_per_forward` at a time."""
        for part in tokens.split(self.blocks_per_forward):
            yield self.activations(part, [[layer] for layer in layers])

    def first_rows(self, slots: list[list[int]], num_blocks: int) -> Callable[[], ActivationBatch]:
        """Return what makes the first rows of training, at most so many blocks, for a trial."""
        if self.is_stored:
            return partial(self.stored_first, slots, num_blocks)
        tokens = next(iter(self.loader("train", 1, self.seed)))[:num_blocks]
        return partial(self.activations, tokens, slots)

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
