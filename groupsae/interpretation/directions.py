"""What a latent's decoder direction says by itself: the tokens it promotes, and its neighbours."""

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groupsae.lm.hooked import HookedLM

NEAREST, PROMOTED, BINS, CHUNK = 5, 10, 50, 256


class Directions(NamedTuple):
    """Neighbours of each latent in the decoder, and its effect on the logits.

    The effect is that of one unit of the latent, at the last layer and without what later layers
    make of it ("direct logit attribution"): the direction through the model's final norm, whose
    divisor is left out, and its unembedding. Empty, [d_sae, 0], for a model without logits.
    """

    # the latents with the highest cosine, highest first; `cosines` are theirs
    nearest: Int[np.ndarray, "d_sae near"]
    cosines: Float[np.ndarray, "d_sae near"]
    # the tokens whose logits rise most; `promoted_by` how much
    promoted: Int[np.ndarray, "d_sae token"]
    promoted_by: Float[np.ndarray, "d_sae token"]
    # the tokens whose logits fall most; `suppressed_by` how much
    suppressed: Int[np.ndarray, "d_sae token"]
    suppressed_by: Float[np.ndarray, "d_sae token"]
    # how many logits change by how much, in bins of equal width between `lowest` and
    # `highest`
    histogram: Int[np.ndarray, "d_sae bins"]
    lowest: Float[np.ndarray, " d_sae"]
    highest: Float[np.ndarray, " d_sae"]


@torch.no_grad()
def directions_of(decoder: Float[Tensor, "d_sae d_model"], lm: HookedLM) -> Directions:
    """Return the neighbours and the effects of all latents of one SAE."""
    norm, model = final_norm(lm), cast(Any, lm.model)
    head = model.get_output_embeddings() if lm.predicts else None
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, len(decoder), CHUNK):
        part = decoder[first : first + CHUNK]
        cosines = part @ decoder.T  # the rows have unit norm
        own = torch.arange(len(part), device=part.device)
        cosines[own, own + first] = -2.0
        near = cosines.topk(min(NEAREST, len(decoder) - 1), dim=1)
        if head is None:
            none = part.new_zeros(len(part), 0)
            effects: tuple[Tensor, ...] = (none.long(), none, none.long(), none, none.long())
            effects += (part.new_zeros(len(part)),) * 2
        else:
            effects = _effects(effect_on_logits(part, norm, head))
        parts.append((near.indices, near.values, *effects))
    return Directions(*(torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True)))


def effect_on_logits(
    directions: Float[Tensor, "latent d_model"], norm: nn.Module | None, head: nn.Module
) -> Float[Tensor, "latent vocab"]:
    """Return the change of the logits by each direction, the norm's divisor left out."""
    dtype = next(head.parameters()).dtype
    x = directions.to(dtype)
    if norm is not None:
        # norm(x) - norm(0) is the centred and weighted direction, whatever the norm's convention
        nothing = norm(torch.zeros_like(x[:1]))
        centres = torch.allclose(norm(torch.ones_like(x[:1])), nothing, atol=1e-2)
        scale = (x - x.mean(1, keepdim=True) if centres else x).float().square().mean(1).sqrt()
        x = ((norm(x) - nothing).float() * scale.unsqueeze(1)).to(dtype)
    logits: Tensor = head(x) - head(torch.zeros_like(x[:1]))
    return logits.float()


def final_norm(lm: HookedLM) -> nn.Module | None:
    """Return the norm between the last block and the unembedding; None if there is none.

    It is the first module after the last block that is called a norm or weights d_model values.
    """
    if not lm.predicts:
        return None
    called: list[nn.Module] = []
    device = next(lm.model.parameters()).device
    inside = {module for block in lm.blocks for module in block.modules()}
    outside = [m for m in lm.model.modules() if m not in inside or m is lm.blocks[-1]]
    handles = [
        m.register_forward_hook(lambda module, _args, _output: called.append(module))
        for m in outside
    ]
    try:
        lm.model(**lm.inputs(torch.zeros(1, 2, dtype=torch.int64, device=device)))
    finally:
        for handle in handles:
            handle.remove()
    after = called[called.index(lm.blocks[-1]) + 1 :]
    for module in after:
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() or (
            weight is not None and weight.shape == (lm.d_model,)
        ):
            return module
    return None


def _effects(logits: Float[Tensor, "latent vocab"]) -> tuple[Tensor, ...]:
    count = min(PROMOTED, logits.shape[1])
    high, low = logits.topk(count, dim=1), logits.topk(count, dim=1, largest=False)
    lowest, highest = logits.amin(1), logits.amax(1)
    width = ((highest - lowest) / BINS).clamp(min=1e-12)
    bins = ((logits - lowest.unsqueeze(1)) / width.unsqueeze(1)).long().clamp(max=BINS - 1)
    histogram = torch.zeros(len(logits), BINS, dtype=torch.int64, device=logits.device)
    histogram.scatter_add_(1, bins, torch.ones_like(bins))
    return high.indices, high.values, low.indices, low.values, histogram, lowest, highest
