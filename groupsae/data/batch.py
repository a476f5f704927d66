"""What the stream hands to training: activations, where they come from, and which count."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


class ActivationBatch(NamedTuple):
    """Residual activations of one batch of tokens.

    Attributes:
        acts: raw (unscaled) `resid_post`, one row for each slot and token. A slot is a set of
            layers; each token shows one of them.
        layers: the layer that each row comes from.
        keep: tokens that count, False at special tokens; None if none are excluded.
    """

    acts: Float[Tensor, "slot token d_model"]
    layers: Int[Tensor, "slot token"]
    keep: Bool[Tensor, "token"] | None

    def rows(self, slot: int) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, "row"]]:
        """Return the activations that count in one slot, and their layers."""
        if self.keep is None:
            return self.acts[slot], self.layers[slot]
        return self.acts[slot][self.keep], self.layers[slot][self.keep]
