"""Which latents fire where in a part of the text, and in which windows they peak."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.sae.base import SparseLatents

WINDOW = 32  # tokens of a context, and of a window
LOW = 2**32 - 1  # the lower half of a key (shifts are a tenth of the cost of divisions)


class Firings(NamedTuple):
    """All firings of one SAE on one layer in a part of the text, by latent and then by token."""

    # latent * 2^32 + token, ascending; a token is a place in the part, from 0
    keys: Int[Tensor, "firing"]
    values: Float[Tensor, "firing"]  # activations in the SAE's units, above zero
    tokens: int  # number of tokens in the part

    @property
    def latents(self) -> Int[Tensor, "firing"]:
        """Return the latent of each firing."""
        return self.keys >> 32

    @property
    def places(self) -> Int[Tensor, "firing"]:
        """Return the token of each firing."""
        return self.keys & LOW

    def at(
        self,
        latents: Int[Tensor, "context"],
        begin: Int[Tensor, "context"],
        lengths: Int[Tensor, "context"],
    ) -> Float[Tensor, "context window"]:
        """Return one latent's activation on each token of some contexts; 0 where it is silent.

        A context has at most `WINDOW` tokens, so its firings are among the `WINDOW` that follow.
        """
        shown = torch.zeros(len(begin), WINDOW + 1, device=begin.device)
        if not len(self.keys):
            return shown[:, :WINDOW]
        first = (latents << 32) + begin
        at = torch.searchsorted(self.keys, first).unsqueeze(1)
        at = at + torch.arange(WINDOW, device=begin.device)
        inside = at.clamp(max=len(self.keys) - 1)
        offsets = self.keys[inside] - first.unsqueeze(1)
        wanted = (at < len(self.keys)) & (offsets < lengths.unsqueeze(1))
        offsets = torch.where(wanted, offsets, WINDOW)  # the last column is thrown away
        return shown.scatter_(1, offsets, self.values[inside])[:, :WINDOW]


Entries = tuple[Int[Tensor, "firing"], Float[Tensor, "firing"]]  # keys and values, as of Firings


def entries_of(latents: SparseLatents, keep: Bool[Tensor, "token"] | None, first: int) -> Entries:
    """Return the firings of some tokens, the first of which is at place `first` of its part.

    Where `keep` is False, nothing counts as firing.
    """
    active = latents.acts > 0
    if keep is not None:
        active &= keep.unsqueeze(1)
    places, columns = active.nonzero(as_tuple=True)
    found = latents.indices[places, columns].long()
    return (found << 32) + places + first, latents.acts[places, columns].float()


def firings_of(entries: Sequence[Entries], tokens: int) -> Firings:
    """Return all firings of a part of `tokens` tokens, in order."""
    keys, values = (torch.cat(each) for each in zip(*entries, strict=True))
    keys, order = keys.sort()
    return Firings(keys, values[order], tokens)


class Peaks(NamedTuple):
    """The highest activation of each latent in each window in which it fires.

    The windows of a block of tokens start at its positions 0, 32, 64 and so on.
    """

    latents: Int[Tensor, "peak"]  # latent of each peak, ascending
    windows: Int[Tensor, "peak"]  # number of its window in the part
    values: Float[Tensor, "peak"]  # the activation
    places: Int[Tensor, "peak"]  # its token; of several with the same activation the first

    def where(self, chosen: Tensor) -> "Peaks":
        """Return some of them."""
        return Peaks(*(each[chosen] for each in self))


def windows_in(context: int) -> int:
    """Return how many windows a block of tokens has; the last one may be shorter."""
    return -(-context // WINDOW)


def peaks_of(firings: Firings, context: int) -> Peaks:
    """Return the peaks of a part that consists of blocks of `context` tokens."""
    latents, places, values = firings.latents, firings.places, firings.values
    every = torch.arange(firings.tokens, device=places.device)
    of_place = every // context * windows_in(context) + every % context // WINDOW
    keys = (latents << 32) + of_place[places]
    units, owner = torch.unique_consecutive(keys, return_inverse=True)
    highest = torch.zeros(len(units), device=values.device)
    highest.scatter_reduce_(0, owner, values, "amax")
    first = torch.full_like(units, firings.tokens)
    first.scatter_reduce_(
        0, owner, torch.where(values == highest[owner], places, firings.tokens), "amin"
    )
    return Peaks(units >> 32, units & LOW, highest, first)
