"""Contexts of a latent from its strongest firings to its weakest."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from groupsae.interpretation.files import LatentContexts

BANDS = 5  # of equal numbers of firing windows, from strong to weak


class Bands(NamedTuple):
    """Contexts from equal parts of the sampled windows in which a latent fires.

    The bands are quantiles of the activations at the peaks of these windows: a band of equal
    width would hold almost nothing at the top.
    """

    contexts: LatentContexts  # strongest first; -1 as peak where there are fewer
    band: Int[np.ndarray, "latent size"]  # the band of each context, 0 for the strongest
    lowest: Float[np.ndarray, "latent bands"]  # the lowest activation at a peak of each band


def bands_of(samples: Sequence[LatentContexts], each: int) -> Bands:
    """Return `each` contexts from every band of the windows that were drawn of both texts."""
    both = [np.concatenate(parts, axis=1) for parts in zip(*samples, strict=True)]
    peaks, values = both[:2]
    order = np.argsort(-values, axis=1, kind="stable")  # empty ones have 0 and come last
    counts = (peaks >= 0).sum(1, keepdims=True)
    wanted = BANDS * each
    # the middle of each of `wanted` equal parts; each context once where there are fewer
    places = ((np.arange(wanted) + 0.5) * counts / wanted).astype(np.int64)
    few = np.minimum(np.arange(wanted), np.maximum(counts - 1, 0))
    places = np.where(counts < wanted, few, places)
    chosen = np.take_along_axis(order, places, axis=1)
    row = np.arange(len(chosen))[:, None]
    found = LatentContexts(*(part[row, chosen] for part in both))
    found.peaks[np.arange(wanted) >= counts] = -1
    last = -(-np.arange(1, BANDS + 1) * counts // BANDS) - 1  # of each band, as a place in order
    lowest = np.take_along_axis(values, order, axis=1)[row, last.clip(0)]
    return Bands(found, places * BANDS // counts.clip(1), lowest)
