"""The windows of text that a judge sees of a latent: some to explain it by, others to score on.

A latent fires where it fires on any layer of its group, with its highest activation there. All
windows come from its complete firings, so that a silent window is silent.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from groupsae.interpretation.collect import excerpt_around
from groupsae.interpretation.explain import highest
from groupsae.interpretation.files import CollectedSAE, Interpretation
from groupsae.interpretation.firings import WINDOW, windows_in
from groupsae.interpretation.text import EXPLAIN

DECILES = 10
CONTEXT = 8  # tokens ending at a peak: two windows that share them are the same to a judge
COMMON = 10  # tokens that a latent fires on most: silent windows with one of them are hard
TRIED = 3000  # places that are tried to find silent windows
LEAST = 10  # windows in which a latent fires, and in which it is silent, to be scored
POSITIVE, RANDOM, SAME_TOKEN, NEIGHBOUR = "positive", "random", "same_token", "neighbour"


class Protocol(NamedTuple):
    """How many windows of each kind a judge sees of a latent, and from where."""

    explain: int = 2  # of each decile of activations, to explain it by
    positives: int = 4  # of each decile, to score on
    random: int = 25  # silent ones, drawn uniformly
    same_token: int = 15  # silent ones around a token that it fires on most
    neighbour: int = 10  # silent ones in which one of the nearest latents fires
    marked: float = 0.0  # share of a window's highest activation above which tokens are marked
    apart: bool = True  # score on held-out text, on other windows than those to explain
    each_piece: int = 2  # from a document's part of a block, of one side, at most; 0: any number

    @property
    def scored(self) -> int:
        """Return how many windows there are to score on, at most."""
        silent = self.random + self.same_token + self.neighbour
        return DECILES * self.positives + silent


# of Paulo et al. (arXiv 2410.13928), as its code has it: explains and scores on one list
DELPHI = Protocol(4, 5, 50, 0, 0, marked=0.3, apart=False, each_piece=0)


class Window(NamedTuple):
    """Up to 32 tokens of one document."""

    kind: str  # `positive`, or how a silent window was found
    peak: int  # position of its highest activation; of a silent window, the one it was found by
    start: int  # position of its first token
    length: int  # number of tokens
    # places in it of the marked tokens; those of a silent window are a positive's
    marks: tuple[int, ...]
    group: int = -1  # decile of a positive; number of the neighbour that fires in a silent window


class LatentWindows(NamedTuple):
    """What a judge sees of one latent."""

    explain: list[Window]  # windows to explain it by
    score: list[Window]  # windows to score on, in a random order
    rate: float  # share of all windows of the score text in which it fires
    fired: int  # number of tokens of the score text on which it fires
    overlap: float  # share of the positive score windows that are windows to explain as well
    dropped: int  # score windows left out because a window to explain has the same context

    @property
    def enough(self) -> bool:
        """Return whether there are enough windows of each side to score on."""
        kinds = Counter(window.kind for window in self.score)
        return bool(self.explain) and min(kinds[POSITIVE], kinds[RANDOM]) >= LEAST


class WindowChooser:
    """Chooses the windows of the latents of one SAE; a function of the seed and the latent."""

    def __init__(
        self, found: Interpretation, sae: CollectedSAE, protocol: Protocol, seed: int = 0
    ) -> None:
        self.found, self.sae, self.protocol, self.seed = found, sae, protocol, seed
        self.sampled = [sae.contexts("heldout", layer).peaks for layer in sae.layers]
        boundary, total = found.num_tokens[EXPLAIN], sum(found.num_tokens)
        self.explain = range(boundary)
        self.score = range(boundary, total) if protocol.apart else self.explain

    def of(self, latent: int) -> LatentWindows:
        """Return the windows of one latent."""
        firings = highest([self.sae.firings(layer, latent) for layer in self.sae.layers])
        explain, *_ = self._positives(latent, firings, self.explain, self.protocol.explain, set())
        known = {self._before(window.peak) for window in explain}
        known |= {self._before(w.start + mark) for w in explain for mark in w.marks}
        known = known if self.protocol.apart else set()
        positives, fires, dropped = self._positives(
            latent, firings, self.score, self.protocol.positives, known
        )
        silent = self._silent(latent, firings[0], positives, known) if positives else []
        windows = len(self.score) // self.found.context * windows_in(self.found.context)
        return LatentWindows(
            explain,
            self._draws(latent, "-1").sample(positives + silent, len(positives + silent)),
            fires / windows,
            int(np.diff(np.searchsorted(firings[0], [self.score.start, self.score.stop]))[0]),
            len({w.peak for w in explain} & {w.peak for w in positives}) / max(len(positives), 1),
            dropped,
        )

    def _draws(self, latent: int, what: object) -> random.Random:
        return random.Random(f"{self.seed}:{self.sae.name}:{latent}:{what}")

    def _positives(
        self,
        latent: int,
        firings: tuple[np.ndarray, np.ndarray],
        text: range,
        each: int,
        known: set[tuple[int, ...]],
    ) -> tuple[list[Window], int, int]:
        """Return windows of each decile, the number of all windows, and of those left out."""
        draws, used = self._draws(latent, text.start), Counter[int]()
        height = dict(zip(*(x.tolist() for x in self._peaks(*firings, text)), strict=True))
        new = [peak for peak in height if self._before(peak) not in known]
        few, most = [], self.protocol.each_piece or len(new)
        for peak in draws.sample(new, len(new)):
            used[piece := int(self.found.pieces[peak])] += 1
            if used[piece] <= most:
                few.append(peak)
        few.sort(key=lambda peak: (height[peak], peak))
        found = [
            self._positive(peak, decile, *firings)
            for decile, part in enumerate(np.array_split(np.array(few, np.int64), DECILES))
            for peak in draws.sample(part.tolist(), min(each, len(part)))
        ]
        return found, len(height), len(height) - len(new)

    def _peaks(
        self, positions: np.ndarray, acts: np.ndarray, text: range
    ) -> tuple[Int[np.ndarray, " window"], np.ndarray]:
        """Return the highest activation of each window of a text in which the latent fires."""
        inside = slice(*np.searchsorted(positions, [text.start, text.stop]))
        positions, acts = positions[inside], acts[inside]
        windows = positions // self.found.context * windows_in(self.found.context)
        windows += positions % self.found.context // WINDOW
        order = np.lexsort((positions, -acts, windows))
        first = order[np.unique(windows[order], return_index=True)[1]]
        return positions[first], acts[first]

    def _positive(self, peak: int, group: int, positions: np.ndarray, acts: np.ndarray) -> Window:
        begin, lengths = excerpt_around(torch.tensor([peak]), *self.found.bounds)
        start, length = int(begin[0]), int(lengths[0])
        inside = slice(*np.searchsorted(positions, [start, start + length]))
        strong = acts[inside] > self.protocol.marked * acts[inside].max()
        marks = tuple((positions[inside][strong] - start).tolist())
        return Window(POSITIVE, peak, start, length, marks, group)

    def _before(self, peak: int) -> tuple[int, ...]:
        """Return the tokens of the document that end at a place, eight at most."""
        start = max(int(self.found.bounds[0][peak]), peak - CONTEXT + 1)
        return tuple(self.found.tokens[start : peak + 1].tolist())

    def _silent(
        self,
        latent: int,
        positions: np.ndarray,
        positives: Sequence[Window],
        known: set[tuple[int, ...]],
    ) -> list[Window]:
        """Return silent windows of every kind, marked where positive ones are."""
        protocol, used, draws = self.protocol, Counter[int](), self._draws(latent, "silent")
        most = protocol.each_piece or len(self.found.tokens)
        donors = draws.sample(positives, len(positives))
        found: list[Window] = []

        def add(kind: str, count: int, places: Sequence[int], group: int = -1) -> None:
            peaks = torch.tensor(places, dtype=torch.int64)
            begin, lengths = excerpt_around(peaks, *self.found.bounds)
            first, last = begin.numpy(), (begin + lengths).numpy()
            silent = np.searchsorted(positions, first) == np.searchsorted(positions, last)
            for i in np.flatnonzero(silent).tolist():
                if count == 0:
                    return
                peak, start, length = places[i], int(first[i]), int(last[i] - first[i])
                piece = int(self.found.pieces[peak])
                if used[piece] >= most or self._before(peak) in known:
                    continue
                # every positive in turn, as far as its marks fit
                fits = (n for n, donor in enumerate(donors) if donor.marks[-1] < length)
                if (place := next(fits, None)) is None:
                    continue
                used[piece], count = used[piece] + 1, count - 1
                donors.append(donor := donors.pop(place))
                found.append(Window(kind, peak, start, length, donor.marks, group))

        add(RANDOM, protocol.random, draws.sample(self.score, min(TRIED, len(self.score))))
        if protocol.same_token:
            seen = positions[positions < self.explain.stop]
            tokens, counts = np.unique(self.found.tokens[seen], return_counts=True)
            common = tokens[np.lexsort((tokens, -counts))[:COMMON]]
            alike = np.flatnonzero(np.isin(self.found.tokens[self.score.start :], common))
            places = (alike + self.score.start).tolist()
            add(SAME_TOKEN, protocol.same_token, draws.sample(places, min(TRIED, len(places))))
        near = self.sae.directions.nearest[latent].tolist() if protocol.neighbour else []
        for number, other in enumerate(near):
            peaks = sorted({p for each in self.sampled for p in each[other].tolist() if p >= 0})
            count = protocol.neighbour // len(near)
            add(NEIGHBOUR, count, draws.sample(peaks, len(peaks)), number)
        return found


def text_of(found: Interpretation, window: Window, *, marked: bool) -> str:
    """Return a window as text; marked tokens stand between « and »."""
    strings = found.text(window.start, window.length)
    marks = set(window.marks) if marked else set()
    parts = []
    for place, text in enumerate(strings):
        opens = place in marks and place - 1 not in marks
        closes = place in marks and place + 1 not in marks
        parts.append(f"{'«' if opens else ''}{text}{'»' if closes else ''}")
    return "".join(parts)
