"""Which positions of a block count: special tokens, first positions, extreme norms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.runtime.errors import UserError


@dataclass(frozen=True)
class TokenFilter:
    """Which positions are left out of training, calibration and evaluation alike.

    Attributes:
        special_ids: tokens to leave out; None keeps all.
        skip_positions: the first so many positions of each block are left out.
        max_norm_ratio: activations are left out whose norm is more than so many times the median
            norm of their block of tokens at that layer (attention sinks, Xiao et al., arXiv
            2309.17453); None keeps all. The median is over all positions of the block, left out
            or not (of an even number the lower middle one), so neither the batch nor the number
            of processes matters.
    """

    special_ids: Int[Tensor, " id"] | None
    skip_positions: int
    max_norm_ratio: float | None

    @classmethod
    def recorded(
        cls, trained: Mapping[str, Any], special_ids: list[int], start_token: int | None
    ) -> "TokenFilter":
        """Return the filter of a training, from an SAE's `cfg.json`.

        Args:
            trained: `exclude_special_tokens`, `skip_positions` and `max_norm_ratio`, if known.
            special_ids: the tokenizer's tokens that are no text.
            start_token: the decoder's first token in an encoder-decoder model.
        """
        special = None
        if trained.get("exclude_special_tokens"):
            special = torch.tensor(special_ids + ([] if start_token is None else [start_token]))
        return cls(special, trained.get("skip_positions") or 0, trained.get("max_norm_ratio"))

    def tokens(self, read: Int[Tensor, "block pos"]) -> Bool[Tensor, "block pos"] | None:
        """Return which tokens count regardless of their activations; None if all do."""
        if self.special_ids is None and self.skip_positions == 0:
            return None
        keep = torch.ones_like(read, dtype=torch.bool)
        if self.special_ids is not None:
            keep &= ~torch.isin(read, self.special_ids.to(read.device))
        keep[:, : self.skip_positions] = False
        return keep

    def activations(
        self, acts: Float[Tensor, "block pos d_model"]
    ) -> Bool[Tensor, "block pos"] | None:
        """Return which activations of a layer are not extreme; None if there is no limit.

        Those that are not finite are kept: they must be noticed, not filtered away.
        """
        if self.max_norm_ratio is None:
            return None
        norms = torch.linalg.vector_norm(acts, dim=-1, dtype=torch.float32)
        most = self.max_norm_ratio * norms.median(dim=1, keepdim=True).values
        return (norms <= most) | ~norms.isfinite()


def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return which positions two masks keep; None keeps all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def replaced(
    acts: Float[Tensor, "block pos d_model"],
    new: Float[Tensor, "block pos d_model"],
    keep: Bool[Tensor, "block pos"] | None,
) -> Float[Tensor, "block pos d_model"]:
    """Return new activations where a mask keeps them (None: everywhere), in the old dtype."""
    return new.to(acts) if keep is None else torch.where(keep[..., None], new.to(acts), acts)


def check_skip_positions(skip_positions: object, context: int) -> None:
    """Raise UserError if so many positions of a block cannot be skipped."""
    if type(skip_positions) is not int or not 0 <= skip_positions < context:
        raise UserError(
            f"stream.skip_positions is {skip_positions!r}; it must be an integer from 0 to "
            f"{context - 1}, one less than stream.context."
        )
