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
# What only training asks for; the values do nothing here.
_TOPK = {
    "k_start": None,
    "sparsity_warmup": 0.0,
    "auxk_alpha": 0.0,
    "auxk_share": 0.5,
    "selection": "float32",
}
_BATCH = {**_TOPK, "threshold_momentum": 0.0}
_L1 = {"l1_coefficient": 1.0, "sparsity_warmup": 0.0}
UNTRAINED: dict[str, dict[str, Any]] = {
    "topk": _TOPK,
    "batchtopk": _BATCH,
    "matryoshka": _BATCH,
    "relu": _L1,
    "gated": _L1,
    "jumprelu": {
        "target_l0": 1.0,
        "l0_coefficient": 1.0,
        "sparsity_warmup": 0.0,
        "threshold": 1.0,
        "bandwidth": 1.0,
    },
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
        **more: `k` of the topk kinds, `prefixes` of matryoshka.
    """
    state = dict(tensors)
    if kind == "jumprelu":
        least = torch.finfo(torch.float32).tiny
        state["log_threshold"] = state.pop("threshold").clamp_min(least).log()
    d_sae, d_model = state["W_dec"].shape
    arguments = {
        "d_model": d_model,
        "expansion": None,
        "d_sae": d_sae,
        "tied": True,
        **UNTRAINED[kind],
        **more,
    }
    sae = KINDS[kind](**arguments, generator=torch.Generator())
    sae.load_state_dict(state)
    return sae.eval(), arguments
