"""From drawn tokens to rows of activations: only the rows that were drawn are kept."""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from groupsae.data.draws import DrawnTokens
from groupsae.data.exchange import Rows
from groupsae.data.filters import TokenFilter
from groupsae.lm.hooked import HookedLM, Visit

# Shows the activations of some layers for some of a batch's blocks, layer after layer: from a
# forward of the language model, or from disk.
Show = Callable[[slice, Iterable[int], Visit], None]


def by_model(lm: HookedLM, tokens: Int[Tensor, "block pos"]) -> Show:
    """Return a function that gets activations of tokens by running the model."""

    def show(blocks: slice, layers: Iterable[int], visit: Visit) -> None:
        lm.run(lm.inputs(tokens[blocks]), layers, visit, stop=True)

    return show


def all_rows(
    show: Show,
    filters: TokenFilter,
    drawn: DrawnTokens,
    acts: Shaped[Tensor, "slot token d_model"],
) -> Rows:
    """Return the rows that were drawn, written into `acts`; arguments of `rows_by_forward`."""
    parts = rows_by_forward(show, filters, drawn, lambda where: acts[:, where])
    masks = [keep for _, keep in parts if keep is not None]
    return acts, torch.cat(masks, 1) if masks else None


@torch.no_grad()  # not inference_mode: its tensors cannot be saved for the SAEs' backward
def rows_by_forward(
    show: Show,
    filters: TokenFilter,
    drawn: DrawnTokens,
    buffer: Callable[[slice], Shaped[Tensor, "slot part d_model"]],
) -> Iterator[Rows]:
    """Yield the rows that were drawn, one forward of the model after the other.

    The host queues all of it and waits for nothing. `buffer` gives for some tokens a place for
    their rows.
    """
    tokens, keep = drawn.tokens, None
    if filters.max_norm_ratio is not None:
        keep = torch.ones_like(drawn.made.layers, dtype=torch.bool)
        if drawn.made.counted is not None:
            keep &= drawn.made.counted
    size = drawn.blocks_per_forward * tokens.shape[1]
    for number, start in enumerate(range(0, tokens.numel(), size)):
        where = slice(start, min(start + size, tokens.numel()))
        acts, kept = buffer(where), None if keep is None else keep[:, where]
        _write_rows(show, filters, drawn, number, where, acts, kept)
        yield acts, kept


def _write_rows(
    show: Show,
    filters: TokenFilter,
    drawn: DrawnTokens,
    number: int,
    where: slice,
    acts: Float[Tensor, "slot part d_model"],
    keep: Bool[Tensor, "slot part"] | None,
) -> None:
    """Write the rows of one forward, the tokens `where`; take rows of extreme norm from `keep`."""
    slots, context = drawn.exchange.sent, drawn.tokens.shape[1]
    layers, places = drawn.made.layers[:, where], _places(drawn, number, where)

    def keep_rows(layer: int, shown: Tensor) -> None:
        typical, rows = filters.activations(shown), shown.flatten(0, 1)
        for slot, members in enumerate(slots):
            if members == [layer]:
                acts[slot] = rows
            elif layer in members:
                place = places[slot, layer]
                # only drawn rows are converted, and travel if the model is on several devices
                acts[slot].index_copy_(
                    0, place, rows.index_select(0, place.to(rows.device)).to(acts)
                )
            if typical is not None and keep is not None:
                within = typical.flatten().to(acts.device)
                keep[slot] &= within | (layers[slot] != layer)

    blocks = slice(where.start // context, where.stop // context)
    show(blocks, {layer for slot in slots for layer in slot}, keep_rows)


def _places(
    drawn: DrawnTokens, number: int, where: slice
) -> dict[tuple[int, int], Int[Tensor, "row"]]:
    """Return (slot, layer) -> places of its tokens in one forward, for slots of several layers."""
    places: dict[tuple[int, int], Tensor] = {}
    several = (i for i, slot in enumerate(drawn.exchange.sent) if len(slot) > 1)
    for slot, order, shares in zip(several, drawn.order, drawn.shares, strict=True):
        parts = order[where].split(list(shares[number].values()))
        places |= {(slot, x): part for x, part in zip(shares[number], parts, strict=True)}
    return places
