"""One pass over text: what every latent does on every layer it serves."""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.data.draws import mix
from groupsae.interpretation.contexts import Contexts, Held, drawn, highest_first
from groupsae.interpretation.firings import (
    WINDOW,
    Firings,
    Peaks,
    peaks_of,
    windows_in,
)
from groupsae.interpretation.statistics import Statistics
from groupsae.interpretation.text import TEXTS, Part
from groupsae.suite.suite import Suite

FIRING = np.dtype([("latent", "<u4"), ("position", "<u4"), ("act", "<f2")])
LEAST_BEFORE, MOST_BEFORE = 8, 27  # tokens before the peak of a context


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How much is kept of each latent."""

    top: int = 20  # contexts with the highest activations, for each layer
    # contexts drawn at random among those where it fires, for each layer and text
    sample: int = 40
    across: int = 5  # contexts with the highest activations on any layer, seen at every layer
    latents: int = 256  # latents of each SAE to explain
    seed: int = 0  # seed of all draws


class Records:
    """Every firing of some latents, in one file for each layer: what rules are learnt from."""

    def __init__(
        self, folder: Path, latents: Int[Tensor, "latent"], d_sae: int, layers: Iterable[int]
    ) -> None:
        self.files = {layer: folder / f"layer.{layer}.bin" for layer in layers}
        self.wanted = torch.zeros(d_sae, dtype=torch.bool, device=latents.device)
        self.wanted[latents] = True

    def add(self, layer: int, firings: Firings, first: int) -> None:
        """Append a part of the text, which begins at position `first`."""
        latents = firings.latents
        chosen = self.wanted[latents].nonzero().squeeze(1)
        rows = np.empty(len(chosen), FIRING)
        rows["latent"] = latents[chosen].cpu().numpy()
        rows["position"] = (firings.places[chosen] + first).cpu().numpy()
        rows["act"] = firings.values[chosen].cpu().numpy()
        with self.files[layer].open("ab") as handle:
            rows.tofile(handle)

    def sizes(self) -> dict[str, int]:
        """Return the bytes written so far, by layer."""
        return {str(layer): file.stat().st_size for layer, file in self.files.items()}

    def truncate(self, sizes: dict[str, int]) -> None:
        """Drop all that was written after these sizes were; without any, begin empty files."""
        for layer, file in self.files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as handle:
                handle.truncate(sizes.get(str(layer), 0))

    def merge(self, other: "Records") -> None:
        """Add what another process has written."""
        for layer, file in self.files.items():
            with file.open("ab") as ours, other.files[layer].open("rb") as theirs:
                shutil.copyfileobj(theirs, ours)

    def sorted_rows(self, layer: int) -> np.ndarray:
        """Return a layer's firings by latent and position."""
        rows = np.fromfile(self.files[layer], FIRING)
        return rows[np.lexsort((rows["position"], rows["latent"]))]


class SAECollector:
    """What the latents of one SAE do on all layers that it serves.

    `suite` holds that SAE alone; the complete firings of the latents to explain go into `records`.

    Attributes:
        statistics: counts by layer.
        contexts: by kind (`top`, or one of `TEXTS`: a sample) and layer.
        across: contexts seen at every layer.
    """

    def __init__(
        self, name: str, suite: Suite, kept: Kept, records: Path, device: torch.device
    ) -> None:
        self.name, self.layers, self.seed = name, suite.layers, kept.seed
        self.d_sae = suite.saes[name].d_sae
        self.candidates = candidates(kept, name, self.d_sae)
        self.records = Records(records, self.candidates.to(device), self.d_sae, self.layers)
        self.across = Contexts(self.d_sae, kept.across, len(self.layers), device)
        self.statistics = {x: Statistics(self.d_sae, len(TEXTS), device) for x in self.layers}
        sizes = {"top": kept.top} | dict.fromkeys(TEXTS, kept.sample)
        self.contexts = {
            (kind, layer): Contexts(self.d_sae, size, 1, device)
            for layer in self.layers
            for kind, size in sizes.items()
        }

    def update(
        self,
        part: Part,
        found: Mapping[int, Firings],
        bounds: tuple[Int[Tensor, "token"], Int[Tensor, "token"]],
    ) -> None:
        """Add a part: all firings in it by layer, and where its documents begin and end."""
        context = part.tokens.shape[1]
        first_window = part.first // context * windows_in(context)
        highest: list[Peaks] = []
        for layer, firings in found.items():
            peaks = peaks_of(firings, context)
            self.statistics[layer].update(firings, peaks, part.text)
            self.records.add(layer, firings, part.first)
            keys = highest_first(peaks.values, peaks.places + part.first)
            _offer(self.contexts["top", layer], keys, peaks, part.first, [firings], bounds)
            drawn_keys = drawn(stream_of(self.seed, self.name, layer), peaks, first_window)
            sample = self.contexts[TEXTS[part.text], layer]
            _offer(sample, drawn_keys, peaks, part.first, [firings], bounds)
            highest.append(peaks.where(self.across.could_take(peaks.latents, keys)))
        best = _best_layer(highest)
        keys = highest_first(best.values, best.places + part.first)
        _offer(self.across, keys, best, part.first, list(found.values()), bounds)

    def state(self) -> dict[str, Tensor]:
        """Return all tensors by name, such as `top/layer.3/acts`."""
        pieces: dict[str, Statistics | Contexts] = {"across": self.across}
        pieces |= {f"statistics/layer.{layer}": each for layer, each in self.statistics.items()}
        pieces |= {f"{kind}/layer.{layer}": each for (kind, layer), each in self.contexts.items()}
        return {
            f"{place}/{name}": tensor
            for place, piece in pieces.items()
            for name, tensor in piece.tensors().items()
        }

    def merge(self, other: "SAECollector") -> None:
        """Add what another process found in other parts."""
        for layer, each in self.statistics.items():
            each.merge(other.statistics[layer])
        for place, contexts in self.contexts.items():
            contexts.merge(other.contexts[place])
        self.across.merge(other.across)
        self.records.merge(other.records)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def stream_of(seed: int, name: str, layer: int | None = None) -> int:
    """Return the signed 64-bit number that begins the draws of an SAE, or of one of its layers."""
    digest = hashlib.sha256(f"interpretation:{seed}:{name}:{layer}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def candidates(kept: Kept, name: str, d_sae: int) -> Int[Tensor, "latent"]:
    """Return the latents of an SAE to record, in the order in which they are chosen from.

    Twice as many as will be explained, because some fire too rarely for that.
    """
    order = mix(torch.arange(d_sae) + stream_of(kept.seed, name))
    return order.argsort()[: 2 * kept.latents]


def excerpt_around(
    places: Int[Tensor, "peak"],
    starts: Int[Tensor, "token"],
    ends: Int[Tensor, "token"],
    first: int = 0,
) -> tuple[Int[Tensor, "peak"], Int[Tensor, "peak"]]:
    """Return where the contexts around some places begin, and their numbers of tokens.

    The place of the peak in its context is drawn, as a function of its position: it must not
    betray the peak. A context lies inside its document, and is as long as that allows; of each
    token's document there are `starts` and `ends`. All are counted from position `first`.
    """
    before = LEAST_BEFORE + mix(places + first) % (MOST_BEFORE - LEAST_BEFORE + 1)
    begin = torch.minimum(places - before, ends[places] - WINDOW)
    begin = torch.maximum(begin, starts[places])
    return begin, (ends[places] - begin).clamp(max=WINDOW)


def _best_layer(candidates: list[Peaks]) -> Peaks:
    """Return the highest peak over layers of each latent in each window."""
    every = Peaks(*(torch.cat(each) for each in zip(*candidates, strict=True)))
    # by latent, window, highest activation, earliest token: the first of each window counts
    order = highest_first(every.values, every.places).argsort()
    for keys in (every.windows, every.latents):
        order = order[keys[order].argsort(stable=True)]
    every = every.where(order)
    new = torch.ones_like(every.latents, dtype=torch.bool)
    new[1:] = (every.latents[1:] != every.latents[:-1]) | (every.windows[1:] != every.windows[:-1])
    return every.where(new)


def _offer(
    contexts: Contexts,
    keys: Int[Tensor, "peak"],
    peaks: Peaks,
    first: int,
    found: list[Firings],
    bounds: tuple[Int[Tensor, "token"], Int[Tensor, "token"]],
) -> None:
    """Offer the peaks of a part, with the activations around them at the given layers."""

    def contexts_of(taken: Tensor) -> Held:
        latents, places = peaks.latents[taken], peaks.places[taken]
        begin, lengths = excerpt_around(places, *bounds, first)
        acts = [firings.at(latents, begin, lengths) for firings in found]
        return Held(keys[taken], places + first, places - begin, lengths, torch.stack(acts, 1))

    contexts.offer(peaks.latents, keys, contexts_of)
