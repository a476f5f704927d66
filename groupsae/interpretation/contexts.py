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


class Excerpt(NamedTuple):
    """The tokens around peaks, and one latent's activations on them at some layers.

    Attributes:
        before: number of tokens before the peak.
        lengths: number of tokens; a document may be shorter than a window.
        acts: activations, 0 after the end.
    """

    before: UInt8[Tensor, "context"]
    lengths: UInt8[Tensor, "context"]
    acts: Float[Tensor, "context layer window"]


class Contexts:
    """Of each latent the `size` contexts with the smallest keys, no two of which are equal.

    Attributes:
        keys: ascending for each latent; `EMPTY` where there are fewer contexts.
        peaks: position of each peak in the text; -1 where empty.
    """

    keys: Int[Tensor, "d_sae size"]
    peaks: Int[Tensor, "d_sae size"]

    def __init__(self, d_sae: int, size: int, layers: int, device: torch.device) -> None:
        shape = (d_sae, size)
        self.keys = torch.full(shape, EMPTY, device=device)
        self.peaks = torch.full(shape, -1, device=device)
        # excerpts stay where they are when contexts change their rank; a rank has its place
        self._places = torch.arange(d_sae * size, device=device).view(shape)
        self._excerpts = Excerpt(
            torch.zeros(d_sae * size, dtype=torch.uint8, device=device),
            torch.zeros(d_sae * size, dtype=torch.uint8, device=device),
            torch.zeros(d_sae * size, layers, WINDOW, dtype=torch.float16, device=device),
        )

    @staticmethod
    def bytes_for_each(layers: int) -> int:
        """Return the bytes that one context takes."""
        return 3 * 8 + 2 + 2 * layers * WINDOW

    def excerpts(self) -> Excerpt:
        """Return the excerpts of all contexts, [d_sae * size, ...], in the order of the keys."""
        places = self._places.flatten()
        return Excerpt(*(each[places] for each in self._excerpts))

    def could_take(
        self, latents: Int[Tensor, "offer"], keys: Int[Tensor, "offer"]
    ) -> Int[Tensor, "chosen"]:
        """Return which offers are not worse than the worst that is kept."""
        return (keys <= self.keys[latents, -1]).nonzero().squeeze(1)

    def offer(
        self,
        latents: Int[Tensor, "offer"],
        keys: Int[Tensor, "offer"],
        peaks: Int[Tensor, "offer"],
        excerpts: Callable[[Int[Tensor, "taken"]], Excerpt],
    ) -> None:
        """Keep those of the offers that belong to the smallest.

        `excerpts` returns the excerpts of some of the offers; it is called for those that stay.
        """
        chosen = self.could_take(latents, keys)
        if not len(chosen):
            return
        size = self.keys.shape[1]
        touched, owner = torch.unique(latents[chosen], return_inverse=True)
        old = len(touched) * size
        every_owner = torch.cat([torch.arange(old, device=owner.device) // size, owner])
        every_key = torch.cat([self.keys[touched].flatten(), keys[chosen]])
        every_peak = torch.cat([self.peaks[touched].flatten(), peaks[chosen]])
        order = every_key.argsort()
        order = order[every_owner[order].argsort(stable=True)]
        # rank of each within its latent
        counts = torch.bincount(every_owner, minlength=len(touched))
        first = counts.cumsum(0) - counts
        rank = torch.arange(len(order), device=order.device) - first[every_owner[order]]
        stays, is_new = rank < size, order >= old
        kept = order[stays]
        # per latent as many old contexts leave as new ones stay: each takes the place of one
        places = self._places[touched].flatten()
        place = torch.empty(len(kept), dtype=torch.int64, device=kept.device)
        arrived = is_new[stays]
        place[~arrived] = places[kept[~arrived]]
        place[arrived] = places[order[~stays & ~is_new]]
        self.keys[touched] = every_key[kept].view(-1, size)
        self.peaks[touched] = every_peak[kept].view(-1, size)
        self._places[touched] = place.view(-1, size)
        taken = chosen[kept[arrived] - old]
        if len(taken):
            for kept_ones, new in zip(self._excerpts, excerpts(taken), strict=True):
                kept_ones[place[arrived]] = new.to(kept_ones.dtype)

    def merge(self, other: "Contexts") -> None:
        """Keep the smallest of both."""
        theirs = other.excerpts()
        held = (other.keys.flatten() < EMPTY).nonzero().squeeze(1)
        latents = held // other.keys.shape[1]

        def excerpts(taken: Tensor) -> Excerpt:
            return Excerpt(*(each[held[taken]] for each in theirs))

        self.offer(latents, other.keys.flatten()[held], other.peaks.flatten()[held], excerpts)

    def state(self) -> dict[str, Tensor]:
        """Return everything that is kept, [d_sae, size, ...], in the order of the keys."""
        shape = self.keys.shape
        found = {n: e.unflatten(0, shape) for n, e in self.excerpts()._asdict().items()}
        return {"keys": self.keys, "peaks": self.peaks, **found}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        self.keys, self.peaks = state["keys"].clone(), state["peaks"].clone()
        self._places = torch.arange(self.keys.numel(), device=self.keys.device).view_as(self.keys)
        self._excerpts = Excerpt(*(state[n].flatten(0, 1).clone() for n in Excerpt._fields))


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
