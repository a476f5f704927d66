"""What is decided on the host about a batch of tokens, before the model runs."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from groupsae.data.draws import draw_layers


class DrawnTokens(NamedTuple):
    """Token blocks with the layer that each token draws in each slot.

    Draws and token filters depend on ids and positions only. Decided on the host, before the
    tokens are sent, every number of rows is known there: a device that is asked how many it has
    found lets the host wait for all that was queued before.

    Attributes:
        tokens: token ids.
        layers: the layer of each row.
        order: for each slot of several layers and each forward of the model, the places of its
            tokens within that forward: by layer, and ascending within one.
        shares: for each slot of several layers and each forward, layer -> number of tokens; what
            cuts `order` into layers.
        counted: tokens that count; None if all do.
        kept: their places; None if all do.
    """

    tokens: Int[Tensor, "block pos"]
    layers: Int[Tensor, "slot token"]
    order: Int[Tensor, "several token"]
    shares: list[list[dict[int, int]]]
    counted: Bool[Tensor, "token"] | None
    kept: Int[Tensor, "row"] | None

    def to(self, device: torch.device) -> "DrawnTokens":
        """Return everything on the device; a GPU fetches it by itself, if it is pinned.

        Of other devices the host waits: Apple's may read what it has not yet got (pytorch#83015).
        """
        by_itself = device.type == "cuda"
        return self._each(lambda tensor: tensor.to(device, non_blocking=by_itself))

    def pinned(self) -> "DrawnTokens":
        """Return everything in page-locked memory, from which a GPU fetches it by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "DrawnTokens":
        return DrawnTokens(
            change(self.tokens),
            change(self.layers),
            change(self.order),
            self.shares,
            None if self.counted is None else change(self.counted),
            None if self.kept is None else change(self.kept),
        )


def draw(
    tokens: Int[Tensor, "block pos"],
    slots: list[list[int]],
    counted: Bool[Tensor, "block pos"] | None,
    *,
    seed: int,
    first_position: int,
    blocks_per_forward: int,
) -> DrawnTokens:
    """Return what is decided about tokens that lie on the host.

    Args:
        tokens: token ids.
        slots: sets of layers; a set of several draws one uniformly for each token.
        counted: tokens that the filters let pass; None if all.
        seed: of the draws.
        first_position: global index of the first token in the run; decides the draws.
        blocks_per_forward: blocks in one forward of the language model.
    """
    layers = layers_of(slots, first_position, tokens.numel(), seed)
    several = [i for i, slot in enumerate(slots) if len(slot) > 1]
    size = blocks_per_forward * tokens.shape[1]
    order, shares = torch.empty(len(several), tokens.numel(), dtype=torch.int64), []
    for row, i in enumerate(several):
        # of 16-bit integers numpy's stable sort is a radix sort: 0.2 ms for 32,768
        found = layers[i].numpy().astype(np.int16)
        parts = np.split(found, range(size, len(found), size))
        sorts = [np.argsort(part, kind="stable") for part in parts]
        order[row] = torch.from_numpy(np.concatenate(sorts))
        counts = [np.bincount(part, minlength=max(slots[i]) + 1).tolist() for part in parts]
        shares.append([{x: count[x] for x in sorted(slots[i])} for count in counts])
    return DrawnTokens(tokens, layers, order, shares, *flat_and_places(counted))


def layers_of(
    slots: list[list[int]], first_position: int, num_tokens: int, seed: int
) -> Int[Tensor, "slot token"]:
    """Return the layer that each token draws in each slot; the arguments are those of `draw`."""
    positions = torch.arange(num_tokens) + first_position
    if not slots:
        return torch.empty(0, num_tokens, dtype=torch.int64)
    return torch.stack([draw_layers(positions, slot, seed) for slot in slots])


def flat_and_places(
    counted: Bool[Tensor, "block pos"] | None,
) -> tuple[Bool[Tensor, "token"] | None, Int[Tensor, "row"] | None]:
    """Return which tokens count, and the places of those; None if all do."""
    if counted is None:
        return None, None
    flat = counted.flatten()
    return flat, flat.nonzero().squeeze(1)
