"""What the stream hands to training: activations, where they come from, and which count."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class ActivationBatch(NamedTuple):
    """Activations of one batch of tokens, at the language model's hookpoint.

    Attributes:
        slots: the set of layers that each row of `acts` shows one of; a set of which a token
            shows several layers is there as often.
        acts: raw (unscaled), one row for each slot and token.
        layers: the layer that each row comes from.
        keep: rows that count, False where the token filters leave one out; None if all count.
        kept: places of the tokens that count, where those are the same in every slot; None if
            all count, or if the norms of activations decide it (stream.max_norm_ratio).
        sizes: for each slot, layer -> number of its rows that count; None if only the device
            knows.
    """

    slots: list[list[int]]
    acts: Float[Tensor, "slot token d_model"]
    layers: Int[Tensor, "slot token"]
    keep: Bool[Tensor, "slot token"] | None
    kept: Int[Tensor, "row"] | None = None
    sizes: list[dict[int, int]] | None = None

    def rows(self, layers: list[int]) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, "row"]]:
        """Return the activations that count of a set of layers, and the layer of each.

        Where norms decide which do, the host waits for the device to know how many; nowhere else.
        """
        found = [self._rows(place) for place, slot in enumerate(self.slots) if slot == layers]
        if len(found) == 1:
            return found[0]
        acts, shown = zip(*found, strict=True)
        return torch.cat(acts), torch.cat(shown)

    def _rows(self, slot: int) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, "row"]]:
        acts, layers = self.acts[slot], self.layers[slot]
        if self.kept is not None:
            return acts.index_select(0, self.kept), layers.index_select(0, self.kept)
        if self.keep is None:
            return acts, layers
        return acts[self.keep[slot]], layers[self.keep[slot]]

    def sizes_of(self, layers: list[int]) -> dict[int, int] | None:
        """Return layer -> number of rows of a set of layers; None if only the device knows."""
        if self.sizes is None:
            return None
        found = [
            sizes for slot, sizes in zip(self.slots, self.sizes, strict=True) if slot == layers
        ]
        return {layer: sum(sizes[layer] for sizes in found) for layer in layers}

    def everywhere(self) -> Bool[Tensor, "token"] | None:
        """Return the tokens that count in every slot: angles compare layers on the same tokens."""
        return None if self.keep is None else self.keep.all(0)
