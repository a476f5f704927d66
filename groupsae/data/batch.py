"""What the stream hands to training: activations, where they come from, and which count."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


class ActivationBatch(NamedTuple):
    """Activations of one batch of tokens, at the language model's hookpoint.

    Attributes:
        acts: raw (unscaled), one row for each slot and token. A slot is a set of layers; each
            token shows one of them.
        layers: the layer that each row comes from.
        keep: rows that count, False where the token filters leave one out; None if all count.
    """

    acts: Float[Tensor, "slot token d_model"]
    layers: Int[Tensor, "slot token"]
    keep: Bool[Tensor, "slot token"] | None

    def rows(self, slot: int) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, "row"]]:
        """Return the activations that count in one slot, and their layers."""
        if self.keep is None:
            return self.acts[slot], self.layers[slot]
        keep = self.keep[slot]
        return self.acts[slot][keep], self.layers[slot][keep]

    def everywhere(self) -> Bool[Tensor, "token"] | None:
        """Return the tokens that count in every slot: angles compare layers on the same tokens."""
        return None if self.keep is None else self.keep.all(0)
