"""From tokens to rows of activations: one truncated forward for all layers that are drawn."""

import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.data.batch import ActivationBatch
from groupsae.data.drawn import DrawnTokens
from groupsae.data.filters import TokenFilter
from groupsae.lm.hooked import HookedLM


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
    tokens, layers = drawn.tokens, drawn.layers
    acts = torch.empty(len(slots), tokens.numel(), lm.d_model, device=tokens.device)
    keep = None if drawn.counted is None else drawn.counted.expand(len(slots), -1)
    if filters.max_norm_ratio is not None:
        keep = torch.ones_like(layers, dtype=torch.bool) if keep is None else keep.clone()
    needed = {layer for slot in slots for layer in slot}
    for number, part in enumerate(tokens.split(blocks_per_forward)):
        start = number * blocks_per_forward * tokens.shape[1]
        where = slice(start, start + part.numel())
        places = _places(drawn, slots, number, where)

        def keep_rows(
            layer: int,
            found: Tensor,
            where: slice = where,
            places: dict[tuple[int, int], Tensor] = places,
        ) -> None:
            typical, rows = filters.activations(found), found.flatten(0, 1)
            for slot, members in enumerate(slots):
                if members == [layer]:
                    acts[slot, where] = rows
                elif layer in members:
                    mine = places[slot, layer]
                    # only drawn rows are converted, and travel if the model is spread out
                    shown = rows.index_select(0, mine.to(rows.device)).to(acts)
                    acts[slot, where].index_copy_(0, mine, shown)
                if typical is not None and keep is not None:
                    within = typical.flatten().to(acts.device)
                    keep[slot, where] &= within | (layers[slot, where] != layer)

        lm.run(lm.inputs(part), needed, keep_rows, stop=True)
    # rows that are left out by their norm differ from slot to slot, and only the device knows them
    return ActivationBatch(
        acts, layers, keep, drawn.kept if filters.max_norm_ratio is None else None
    )


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
