"""From tokens to rows of activations: one truncated forward for all layers that are drawn."""

import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.data.batch import ActivationBatch
from groupsae.data.draws import draw_layers
from groupsae.data.filters import TokenFilter
from groupsae.lm.hooked import HookedLM


@torch.no_grad()  # not inference_mode: its tensors cannot be saved for the SAEs' backward
def draw_rows(
    lm: HookedLM,
    filters: TokenFilter,
    tokens: Int[Tensor, "block pos"],
    slots: list[list[int]],
    *,
    seed: int,
    first_position: int,
    blocks_per_forward: int,
) -> ActivationBatch:
    """Return one row per slot and token; memory is tokens x slots x d_model.

    Args:
        lm: the language model.
        filters: which rows count.
        tokens: token ids.
        slots: sets of layers; a set of several draws one uniformly for each token.
        seed: of the draws.
        first_position: global index of the first token in the run; decides the draws.
        blocks_per_forward: blocks in one forward of the language model; bounds its memory.
    """
    count = tokens.numel()
    positions = torch.arange(count, device=tokens.device) + first_position
    layers = torch.stack([draw_layers(positions, slot, seed) for slot in slots])
    acts = torch.empty(len(slots), count, lm.d_model, device=tokens.device)
    counted = filters.tokens(lm.read(tokens))
    keep = None if counted is None else counted.flatten().expand(len(slots), -1)
    if filters.max_norm_ratio is not None:
        keep = torch.ones_like(layers, dtype=torch.bool) if keep is None else keep.clone()
    for start in range(0, len(tokens), blocks_per_forward):
        part = tokens[start : start + blocks_per_forward]
        where = slice(start * tokens.shape[1], start * tokens.shape[1] + part.numel())

        def keep_rows(layer: int, found: Tensor, where: slice = where) -> None:
            found = found.to(acts)  # of a model that lies on several devices, too
            typical, rows = filters.activations(found), found.flatten(0, 1)
            for slot, members in enumerate(slots):
                if members == [layer]:
                    acts[slot, where] = rows
                elif layer in members:
                    mine = (layers[slot, where] == layer).nonzero().squeeze(1)
                    acts[slot, where].index_copy_(0, mine, rows[mine])
                if typical is not None and keep is not None:
                    keep[slot, where] &= typical.flatten() | (layers[slot, where] != layer)

        needed = {layer for slot in slots for layer in slot}
        lm.run(lm.inputs(part), needed, keep_rows, stop=True)
    return ActivationBatch(acts, layers, keep)
