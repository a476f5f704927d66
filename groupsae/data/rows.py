"""From tokens to rows of activations: one truncated forward for all layers that are drawn."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.data.batch import ActivationBatch
from groupsae.data.drawn import DrawnTokens
from groupsae.data.filters import TokenFilter
from groupsae.lm.hooked import HookedLM, Visit

# Shows the activations of some layers for some of a batch's blocks, whole, layer after layer:
# from a forward of the language model, or from where they are stored.
Show = Callable[[slice, Iterable[int], Visit], None]


def by_model(lm: HookedLM, tokens: Int[Tensor, "block pos"]) -> Show:
    """Return what shows the activations of tokens by running the model, up to the last layer."""

    def show(blocks: slice, layers: Iterable[int], visit: Visit) -> None:
        lm.run(lm.inputs(tokens[blocks]), layers, visit, stop=True)

    return show


@torch.no_grad()  # not inference_mode: its tensors cannot be saved for the SAEs' backward
def draw_rows(
    lm: HookedLM,
    filters: TokenFilter,
    drawn: DrawnTokens,
    slots: list[list[int]],
    *,
    blocks_per_forward: int,
) -> ActivationBatch:
    """Return one row per slot and token; memory is tokens x slots x d_model.

    The host queues all of it and waits for nothing.

    Args:
        lm: the language model.
        filters: which rows count by their norm.
        drawn: tokens and draws, on the model's device.
        slots: sets of layers, those that were drawn from.
        blocks_per_forward: as drawn with; bounds the memory of a forward.
    """
    tokens = drawn.tokens
    acts = torch.empty(len(slots), tokens.numel(), lm.d_model, device=tokens.device)
    keep, show = which_count(drawn, filters, len(slots)), by_model(lm, tokens)
    for number, start in enumerate(range(0, tokens.numel(), blocks_per_forward * tokens.shape[1])):
        where = slice(start, start + blocks_per_forward * tokens.shape[1])
        kept = None if filters.max_norm_ratio is None or keep is None else keep[:, where]
        write_rows(show, filters, drawn, slots, number, where, acts[:, where], kept)
    # rows that are left out by their norm differ from slot to slot, and only the device knows them
    return ActivationBatch(
        acts, drawn.layers, keep, drawn.kept if filters.max_norm_ratio is None else None
    )


def which_count(
    drawn: DrawnTokens, filters: TokenFilter, num_slots: int
) -> Bool[Tensor, "slot token"] | None:
    """Return which rows count by what is known beforehand; to be written to if norms decide."""
    keep = None if drawn.counted is None else drawn.counted.expand(num_slots, -1)
    if filters.max_norm_ratio is None:
        return keep
    return torch.ones_like(drawn.layers, dtype=torch.bool) if keep is None else keep.clone()


@torch.no_grad()
def write_rows(
    show: Show,
    filters: TokenFilter,
    drawn: DrawnTokens,
    slots: list[list[int]],
    number: int,
    where: slice,
    acts: Float[Tensor, "slot part d_model"],
    keep: Bool[Tensor, "slot part"] | None,
) -> None:
    """Have the activations of one forward of the model shown; write the rows that were drawn.

    Args:
        show: shows them.
        filters: which rows count by their norm.
        drawn: tokens and draws, on the device of what is shown.
        slots: those that were drawn from.
        number: of the forward.
        where: its tokens among the drawn.
        acts: where its rows go.
        keep: which of them count; those of extreme norm are taken out. None if norms do not
            matter.
    """
    layers, places = drawn.layers[:, where], _places(drawn, slots, number, where)
    context = drawn.tokens.shape[1]
    blocks = slice(where.start // context, where.stop // context)

    def keep_rows(layer: int, found: Tensor) -> None:
        typical, rows = filters.activations(found), found.flatten(0, 1)
        for slot, members in enumerate(slots):
            if members == [layer]:
                acts[slot] = rows
            elif layer in members:
                mine = places[slot, layer]
                # only drawn rows are converted, and travel if the model is spread out
                shown = rows.index_select(0, mine.to(rows.device)).to(acts)
                acts[slot].index_copy_(0, mine, shown)
            if typical is not None and keep is not None:
                within = typical.flatten().to(acts.device)
                keep[slot] &= within | (layers[slot] != layer)

    show(blocks, {layer for slot in slots for layer in slot}, keep_rows)


def _places(
    drawn: DrawnTokens, slots: list[list[int]], number: int, where: slice
) -> dict[tuple[int, int], Int[Tensor, "row"]]:
    """Return (slot, layer) -> places of its tokens in one forward, for slots of several layers."""
    places: dict[tuple[int, int], Tensor] = {}
    several = (i for i, slot in enumerate(slots) if len(slot) > 1)
    for slot, order, shares in zip(several, drawn.order, drawn.shares, strict=True):
        cut = order[where].split(list(shares[number].values()))
        places |= {(slot, x): mine for x, mine in zip(shares[number], cut, strict=True)}
    return places
