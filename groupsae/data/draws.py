"""Which layers each token draws, decided on the host before the language model runs.

The layers are a pure function of seed, group and position in the run.
"""

import hashlib
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.data.batch import ActivationBatch
from groupsae.data.exchange import Exchange, Rows

# SplitMix64 (Steele, Lea, Flood 2014): increment and the two multipliers, as signed int64.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return 64 bits that look random for each integer: the finaliser of SplitMix64."""
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def stream_key(seed: int, layers: list[int]) -> int:
    """Return the signed 64-bit key of one group's stream of draws."""
    digest = hashlib.sha256(f"{seed}:{layers}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def draw_layers(
    positions: Int[Tensor, "token"], layers: list[int], seed: int, count: int = 1
) -> Int[Tensor, "row token"]:
    """Return `count` different layers for each position, uniform over all such sets of `layers`.

    A counter-based generator (SplitMix64 of the position) instead of a stateful one: the draw
    of a token depends on nothing but (seed, group, global position), so it is the same on one
    process or many, after a resume, and whichever other groups are trained. Several are drawn
    without replacement by Floyd's algorithm (Bentley and Floyd 1987).
    """
    members, size = torch.tensor(layers, device=positions.device), len(layers)
    if count == size:
        return members.unsqueeze(1).expand(-1, len(positions))
    x = mix(positions * GAMMA + stream_key(seed, layers))
    chosen: list[Tensor] = []
    for last in range(size - count, size):
        if chosen:
            x = mix(x + GAMMA)
        choice = _shift_right(x, 33) % (last + 1)  # 31 bits: the bias is below size / 2^31
        for before in chosen:
            choice = torch.where(choice == before, last, choice)
        chosen.append(choice)
    return members[torch.stack(chosen)]


class Labels(NamedTuple):
    """What is known about rows before their activations are."""

    layers: Int[Tensor, "slot token"]
    counted: Bool[Tensor, "token"] | None  # regardless of their activations; None if all count
    kept: Int[Tensor, "row"] | None  # places of those tokens
    sizes: list[dict[int, int]]  # for each slot, layer -> rows of those tokens

    def map(self, change: Callable[[Tensor], Tensor]) -> "Labels":
        """Return them with each tensor changed."""
        counted, kept = (None if x is None else change(x) for x in (self.counted, self.kept))
        return Labels(change(self.layers), counted, kept, self.sizes)


class DrawnTokens(NamedTuple):
    """A process's share of a batch of token blocks, and the layers that each token draws.

    Draws and token filters depend on ids and positions only. Decided on the host, before the
    tokens are sent to the device, every number of rows is known there: a device that is asked how
    many it has found makes the host wait for everything that was queued before.

    Attributes:
        tokens: token ids.
        exchange: who needs rows of which slots.
        blocks_per_forward: blocks in one forward of the language model.
        made: labels of the rows that this process makes, for `exchange.sent`.
        order: for each of those slots that has several layers, the places of its tokens within
            each forward: by layer, and ascending within one.
        shares: for each of those slots and each forward, layer -> number of tokens; splits
            `order` by layer.
        shown: labels of the rows that this process gets, for `exchange.own`. Every process knows
            the ids and positions of all tokens, so that only activations travel.
        stored: rows `made`, in the store's dtype, where they were read from a store.
    """

    tokens: Int[Tensor, "block pos"]
    exchange: Exchange
    blocks_per_forward: int
    made: Labels
    order: Int[Tensor, "several token"]
    shares: list[list[dict[int, int]]]
    shown: Labels
    stored: Rows | None = None

    def batch(
        self,
        acts: Float[Tensor, "slot token d_model"],
        keep: Bool[Tensor, "slot token"] | None,
    ) -> ActivationBatch:
        """Return the rows that this process gets; `keep` marks those that count by their norms."""
        slots, (layers, counted, kept, sizes) = self.exchange.own, self.shown
        if keep is not None:  # differs from slot to slot, and only the device knows the places
            return ActivationBatch(slots, acts, layers, keep)
        keep = None if counted is None else counted.expand(len(acts), -1)
        return ActivationBatch(slots, acts, layers, keep, kept, sizes)

    def to(self, device: torch.device) -> "DrawnTokens":
        """Return everything on the device; a GPU fetches it asynchronously if it is pinned.

        For other devices the host waits: Apple's may read data before it arrives (pytorch#83015).
        """
        asynchronous = device.type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=asynchronous))

    def pinned(self) -> "DrawnTokens":
        """Return everything in page-locked memory, from which a GPU fetches asynchronously."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "DrawnTokens":
        made, stored = self.made.map(change), self.stored
        if stored is not None:
            acts, keep = stored
            stored = change(acts), None if keep is None else change(keep)
        return self._replace(
            tokens=change(self.tokens),
            made=made,
            order=change(self.order),
            shown=made if self.shown is self.made else self.shown.map(change),
            stored=stored,
        )


def draw(
    tokens: Int[Tensor, "block pos"],
    exchange: Exchange,
    counted: Callable[[Tensor], Tensor | None],
    *,
    seed: int,
    first_position: int,
    blocks_per_forward: int,
    part: slice = slice(None),
) -> DrawnTokens:
    """Return the decisions about tokens that the host makes.

    Where rows travel, `tokens` are those of all processes, in equal shares. `counted` returns
    which tokens of some blocks count (None: all do). `first_position` is the place of the first
    token in the run. `part` selects blocks of each share; where it is not the complete share, each
    slot must be one layer: then positions decide nothing.
    """

    def labels(wanted: list[list[list[int]]], tokens: Tensor, first: int) -> Labels:
        positions = torch.arange(tokens.numel()) + first
        several = [(x, len(list(same))) for slots in wanted for x, same in groupby(slots)]
        rows = [draw_layers(positions, slot, seed, count) for slot, count in several]
        layers = torch.cat(rows) if rows else positions.new_empty(0, len(positions))
        mask = counted(tokens)
        flat = None if mask is None else mask.flatten()
        kept = None if flat is None else flat.nonzero().squeeze(1)
        every = [slot for slots in wanted for slot in slots]
        rows_that_count = layers if kept is None else layers[:, kept]
        sizes = [_sizes(row, slot) for row, slot in zip(rows_that_count, every, strict=True)]
        return Labels(layers, flat, kept, sizes)

    shares = tokens.view(len(exchange.wanted), -1, tokens.shape[1])
    mine = shares[exchange.rank, part]
    made = labels(exchange.wanted, mine, first_position + exchange.rank * shares[0].numel())
    shown = made
    if exchange.travels:
        shown = labels([exchange.own], shares[:, part].flatten(0, 1), first_position)
    order, counts = _by_layer(made.layers, exchange.sent, blocks_per_forward * tokens.shape[1])
    return DrawnTokens(mine, exchange, blocks_per_forward, made, order, counts, shown)


def _sizes(layers: Int[Tensor, "row"], slot: list[int]) -> dict[int, int]:
    """Return layer -> its number of rows, for the layers of a slot."""
    counts = np.bincount(layers.numpy(), minlength=max(slot) + 1)
    return {layer: int(counts[layer]) for layer in sorted(slot)}


def _by_layer(
    layers: Int[Tensor, "slot token"], slots: list[list[int]], size: int
) -> tuple[Int[Tensor, "several token"], list[list[dict[int, int]]]]:
    """Return `order` and `shares` of `DrawnTokens`; `size` is the tokens of a forward."""
    several = [i for i, slot in enumerate(slots) if len(slot) > 1]
    order, shares = torch.empty(len(several), layers.shape[1], dtype=torch.int64), []
    for row, i in enumerate(several):
        # numpy's stable sort of 16-bit integers is a radix sort: 0.2 ms for 32,768
        drawn = layers[i].numpy().astype(np.int16)
        parts = np.split(drawn, range(size, len(drawn), size))
        sorts = [np.argsort(part, kind="stable") for part in parts]
        order[row] = torch.from_numpy(np.concatenate(sorts))
        counts = [np.bincount(part, minlength=max(slots[i]) + 1).tolist() for part in parts]
        shares.append([{x: count[x] for x in sorted(slots[i])} for count in counts])
    return order, shares
