"""Makes an SAE of ours from tensors that others trained."""

from typing import Any

import torch
from torch import Tensor

from groupsae.sae.base import SAE
from groupsae.sae.batchtopk import BatchTopK
from groupsae.sae.gated import Gated
from groupsae.sae.jumprelu import JumpReLU
from groupsae.sae.matryoshka import Matryoshka
from groupsae.sae.relu import ReLU
from groupsae.sae.topk import TopK

KINDS: dict[str, type[SAE]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "relu": ReLU,
    "gated": Gated,
}


def kind_of(sae: SAE) -> str:
    """Return the kind of an SAE, a key of `KINDS`."""
    return next(kind for kind, made in KINDS.items() if type(sae) is made)


def build(kind: str, tensors: dict[str, Tensor], **more: Any) -> tuple[SAE, dict[str, Any]]:
    """Return the SAE, in evaluation mode, and the arguments that make such a one again.

    Args:
        kind: a key of `KINDS`.
        tensors: with our names and shapes; jumprelu's `threshold` is [d_sae] and must be
            exceeded, one at or below zero means: whatever is above zero.
        **more: `k` of the topk kinds, `prefixes` of matryoshka. Arguments that only training needs
            keep their defaults.
    """
    state = dict(tensors)
    if kind == "jumprelu":
        least = torch.finfo(torch.float32).tiny
        state["log_threshold"] = state.pop("threshold").clamp_min(least).log()
    d_sae, d_model = state["W_dec"].shape
    arguments = {"d_model": d_model, "d_sae": d_sae, **more}
    if kind == "jumprelu":  # only training needs it, and the default may exceed d_sae
        arguments["target_l0"] = 1.0
    sae = KINDS[kind](**arguments, generator=torch.Generator())
    sae.load_state_dict(state)
    return sae.eval(), arguments
