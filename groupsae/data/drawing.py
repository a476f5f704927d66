"""The part of a data module that decides on the host what a batch of tokens will show."""

from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from groupsae.data.batches import TokenBatches
from groupsae.data.drawn import DrawnTokens, draw
from groupsae.data.exchange import Exchange
from groupsae.data.filters import TokenFilter
from groupsae.data.spread import SpreadTokens, draw_spread
from groupsae.lm.hooked import read_after


class DrawnBatches(TokenBatches):
    """Token batches with which tokens count, and the layer that each draws in each slot.

    Attributes:
        slots: the sets of layers that training batches draw from.
        exchanges: of training and validation, where rows travel between processes.
    """

    slots: list[list[int]]
    exchanges: tuple[Exchange, Exchange] | None
    blocks_per_forward: int
    exclude_special_tokens: bool
    skip_positions: int
    max_norm_ratio: float | None

    @cached_property
    def special_ids(self) -> Int[Tensor, " id"]:
        """Return the tokens that are no text."""
        special, start = self.lm.tokenizer().all_special_ids, self.lm.start_token
        return torch.tensor(special if start is None else [*special, start], dtype=torch.int64)

    @property
    def filters(self) -> TokenFilter:
        """Return which tokens count."""
        special = self.special_ids if self.exclude_special_tokens else None
        return TokenFilter(special, self.skip_positions, self.max_norm_ratio)

    def set_slots(self, groups: list[list[int]]) -> None:
        """Choose the sets of layers that training batches draw from, one row each."""
        self.slots = groups

    def used_layers(self) -> list[int]:
        """Return every layer that some slot draws from, sorted."""
        return sorted({layer for slot in self.slots for layer in slot})

    def drawn(
        self, tokens: Int[Tensor, "block pos"], slots: list[list[int]], first_position: int = 0
    ) -> DrawnTokens:
        """Return the draws for tokens on the host; `first_position` as in `activations`."""
        found = draw(
            tokens,
            slots,
            self.counted(tokens),
            seed=self.seed,
            first_position=first_position,
            blocks_per_forward=self.blocks_per_forward,
        )
        return found.pinned() if self.device.type == "cuda" else found

    def counted(self, tokens: Int[Tensor, "block pos"]) -> Bool[Tensor, "block pos"] | None:
        """Return which tokens count whatever their activations; None if all do."""
        return self.filters.tokens(read_after(self.lm.start_token, tokens))

    def spread(
        self, batch: Tensor, first_block: int, *, training: bool
    ) -> SpreadTokens | list[SpreadTokens]:
        """Return what a batch that every process reads in full will show.

        Args:
            batch: its tokens.
            first_block: place of its first block in the run.
            training: or a validation, which comes in parts.
        """
        assert self.exchanges is not None
        training_rows, layers = self.exchanges

        def drawn(exchange: Exchange, part: slice) -> SpreadTokens:
            found = draw_spread(
                batch,
                exchange,
                part,
                self.counted,
                seed=self.seed,
                first_position=first_block * self.packing.context,
                blocks_per_forward=self.blocks_per_forward,
            )
            return found.pinned() if self.device.type == "cuda" else found

        if training:
            return drawn(training_rows, slice(None))
        share, size = len(batch) // len(layers.wanted), self.blocks_per_forward
        return [drawn(layers, slice(i, i + size)) for i in range(0, share, size)]
