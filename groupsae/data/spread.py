"""A batch whose rows come from all processes: each runs the model on its share and sends them."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from groupsae.data.batch import ActivationBatch
from groupsae.data.drawn import DrawnTokens, draw, flat_and_places, layers_of
from groupsae.data.exchange import Exchange
from groupsae.data.filters import TokenFilter
from groupsae.data.rows import by_model, which_count, write_rows
from groupsae.lm.hooked import HookedLM

Part = tuple[Tensor, Tensor | None]


class SpreadTokens(NamedTuple):
    """What is decided on the host about the tokens of all processes.

    Layers and token filters are functions of positions and ids, which every process can read: so
    they are worked out where they are needed, and only activations are sent.

    Attributes:
        mine: this process's share of the tokens, with its draws for every slot that is sent.
        layers: the layer of each row that comes in.
        counted: of all tokens, those that count; None if all do.
        kept: their places; None if all count.
    """

    mine: DrawnTokens
    layers: Int[Tensor, "own token"]
    counted: Bool[Tensor, "token"] | None
    kept: Int[Tensor, "row"] | None

    def to(self, device: torch.device) -> "SpreadTokens":
        """Return everything on the device; a GPU fetches it by itself, if it is pinned."""
        by_itself = device.type == "cuda"
        return self._each(
            self.mine.to(device), lambda tensor: tensor.to(device, non_blocking=by_itself)
        )

    def pinned(self) -> "SpreadTokens":
        """Return everything in page-locked memory."""
        return self._each(self.mine.pinned(), Tensor.pin_memory)

    def _each(self, mine: DrawnTokens, change: Callable[[Tensor], Tensor]) -> "SpreadTokens":
        return SpreadTokens(
            mine,
            change(self.layers),
            None if self.counted is None else change(self.counted),
            None if self.kept is None else change(self.kept),
        )


def draw_spread(
    tokens: Int[Tensor, "block pos"],
    exchange: Exchange,
    part: slice,
    counted: Callable[[Tensor], Tensor | None],
    *,
    seed: int,
    first_position: int,
    blocks_per_forward: int,
) -> SpreadTokens:
    """Return what is decided about a part of every process's share of a batch.

    Args:
        tokens: the whole batch, in equal shares one process after the other.
        exchange: who needs which slots.
        part: blocks of each share.
        counted: tells which tokens of some blocks count, see `draw`.
        seed: of the draws.
        first_position: global index in the run of the batch's first token. Where `part` is not
            the whole share, every slot is one layer and positions decide nothing.
        blocks_per_forward: blocks in one forward of the language model.
    """
    shares = tokens.view(len(exchange.wanted), -1, tokens.shape[1])
    mine, every = shares[exchange.rank, part], shares[:, part].flatten(0, 1)
    drawn = draw(
        mine,
        exchange.sent,
        counted(mine),
        seed=seed,
        first_position=first_position + exchange.rank * shares[0].numel(),
        blocks_per_forward=blocks_per_forward,
    )
    layers = layers_of(exchange.own, first_position, every.numel(), seed)
    return SpreadTokens(drawn, layers, *flat_and_places(counted(every)))


@torch.no_grad()
def exchange_rows(
    lm: HookedLM,
    filters: TokenFilter,
    spread: SpreadTokens,
    exchange: Exchange,
    *,
    dtype: torch.dtype,
    blocks_per_forward: int,
) -> ActivationBatch:
    """Return the rows of this process's slots for the tokens of all processes.

    Each forward's rows are sent as soon as they are there, beside the next forward.

    Args:
        lm: the language model.
        filters: which rows count by their norm.
        spread: tokens and draws, on the model's device.
        exchange: who needs which slots.
        dtype: that rows travel in; of `travelling_dtype`, nothing of them is lost.
        blocks_per_forward: as drawn with.
    """
    mine, slots = spread.mine, exchange.sent
    tokens, by_norm = mine.tokens, filters.max_norm_ratio is not None
    keep, show = which_count(mine, filters, len(slots)), by_model(lm, tokens)

    def parts() -> Iterator[Part]:
        size = blocks_per_forward * tokens.shape[1]
        for number, start in enumerate(range(0, tokens.numel(), size)):
            where = slice(start, min(start + size, tokens.numel()))
            acts = torch.empty(
                len(slots), where.stop - start, lm.d_model, dtype=dtype, device=tokens.device
            )
            kept = None if not by_norm or keep is None else keep[:, where]
            write_rows(show, filters, mine, slots, number, where, acts, kept)
            yield acts, kept

    return exchange_parts(parts(), spread, exchange)


def exchange_parts(
    parts: Iterable[Part], spread: SpreadTokens, exchange: Exchange
) -> ActivationBatch:
    """Send each part of this process's rows as soon as it is there; return what comes in.

    Args:
        parts: rows for `exchange.sent` and, if norms decide which count, which of them do.
        spread: what is known of them beforehand, on the device.
        exchange: who needs which slots.
    """
    outgoing, incoming, masks = [], [], []
    for acts, kept in parts:
        outgoing.append(acts)  # kept until all have arrived
        incoming.append(exchange.start(acts))
        if kept is not None:
            masks.append(exchange.start(kept.contiguous()))
    acts = exchange.join(incoming, torch.float32)
    if masks:
        return ActivationBatch(acts, spread.layers, exchange.join(masks, torch.bool))
    keep = None if spread.counted is None else spread.counted.expand(len(acts), -1)
    return ActivationBatch(acts, spread.layers, keep, spread.kept)


def travelling_dtype(
    lm: HookedLM, tokens: Int[Tensor, "block pos"], layers: list[int]
) -> torch.dtype:
    """Return the narrowest dtype that holds the layers' activations, by running a few tokens."""
    found: list[torch.dtype] = []
    lm.run(lm.inputs(tokens), layers, lambda _, acts: found.append(acts.dtype), stop=True)
    return functools.reduce(torch.promote_types, found)
