"""The contexts that are kept of each latent: those with the smallest keys, whatever the order.

What is kept depends on the set of all offers only, not on their order, so text can be read in
parts of any size, by several processes, and with interruptions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from groupsae.data.draws import mix
from groupsae.interpretation.firings import WINDOW, Peaks

EMPTY = 2**63 - 1  # key of a place that no context has taken yet


class Held(NamedTuple):
    """Contexts, in any shape: what is kept of each, and what is offered."""

    # those with the smallest are kept; `EMPTY` where there is no context
    keys: Int[Tensor, "*shape"]
    peaks: Int[Tensor, "*shape"]  # position of the highest activation in the text; -1 where empty
    before: UInt8[Tensor, "*shape"]  # number of tokens before it
    lengths: UInt8[Tensor, "*shape"]  # number of tokens; a document may be shorter than a window
    # one latent's activations at some layers, 0 after the end
    acts: Float[Tensor, "*shape layer window"]


class Contexts:
    """Of each latent the `size` contexts with the smallest keys, no two of which are equal.

    Attributes:
        held: [d_sae, size], keys ascending for each latent.
    """

    def __init__(self, d_sae: int, size: int, layers: int, device: torch.device) -> None:
        shape = (d_sae, size)
        self.held = Held(
            torch.full(shape, EMPTY, device=device),
            torch.full(shape, -1, device=device),
            torch.zeros(shape, dtype=torch.uint8, device=device),
            torch.zeros(shape, dtype=torch.uint8, device=device),
            torch.zeros(*shape, layers, WINDOW, dtype=torch.float16, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is kept, by name."""
        return self.held._asdict()

    def could_take(
        self, latents: Int[Tensor, "offer"], keys: Int[Tensor, "offer"]
    ) -> Int[Tensor, "chosen"]:
        """Return which offers are not worse than the worst that is kept."""
        return (keys <= self.held.keys[latents, -1]).nonzero().squeeze(1)

    def offer(
        self,
        latents: Int[Tensor, "offer"],
        keys: Int[Tensor, "offer"],
        contexts: Callable[[Int[Tensor, "taken"]], Held],
    ) -> None:
        """Keep those of the offers that belong to the smallest.

        `contexts` returns some of the offers; it is called for those that stay.
        """
        chosen = self.could_take(latents, keys)
        size = self.held.keys.shape[1]
        touched, owner = torch.unique(latents[chosen], return_inverse=True)
        # the kept ones of the latents that are offered something, then the offers
        old = len(touched) * size
        every_owner = torch.cat([torch.arange(old, device=owner.device) // size, owner])
        order = torch.cat([self.held.keys[touched].flatten(), keys[chosen]]).argsort()
        order = order[every_owner[order].argsort(stable=True)]
        counts = torch.bincount(every_owner, minlength=len(touched))
        rank = torch.arange(len(order), device=order.device)
        rank = rank - (counts.cumsum(0) - counts)[every_owner[order]]  # within its latent
        stays = order[rank < size]
        new = stays >= old
        taken = chosen[stays[new] - old]
        if not len(taken):
            return
        for kept, offered in zip(self.held, contexts(taken), strict=True):
            rows = kept[touched].flatten(0, 1)[stays.clamp(max=old - 1)]
            rows[new] = offered.to(kept.dtype)
            kept[touched] = rows.unflatten(0, (-1, size))

    def merge(self, other: "Contexts") -> None:
        """Keep the smallest of both."""
        found = Held(*(each.flatten(0, 1) for each in other.held))
        held = (found.keys < EMPTY).nonzero().squeeze(1)
        latents = held // other.held.keys.shape[1]
        self.offer(latents, found.keys[held], lambda t: Held(*(each[held[t]] for each in found)))


def highest_first(
    values: Float[Tensor, "offer"], peaks: Int[Tensor, "offer"]
) -> Int[Tensor, "offer"]:
    """Return keys that are smaller the higher the (positive) activation, then by position."""
    # the bits of positive floats are ordered as the floats are
    bits = values.float().contiguous().view(torch.int32).long()
    return (2**31 - 1 - bits << 32) + peaks


def value_of(keys: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the activations that `highest_first` made keys of; 0 where empty."""
    bits = torch.where(keys == EMPTY, 0, 2**31 - 1 - (keys >> 32))
    return bits.to(torch.int32).view(torch.float32)


def drawn(stream: int, peaks: Peaks, first_window: int) -> Int[Tensor, "peak"]:
    """Return keys that are uniform: the smallest ones are a sample of all windows that fire.

    A function of the stream (seed, SAE and layer), the latent and the window.
    """
    own = mix(peaks.latents + stream)
    # torch compares signed numbers only: 63 bits, without the sign
    return mix(own + peaks.windows + first_window) & EMPTY - 1
