"""SAEs for the tests, one of each kind."""

from typing import Any

import torch

from groupsae.sae.base import SAE
from groupsae.sae.batchtopk import BatchTopK
from groupsae.sae.gated import Gated
from groupsae.sae.jumprelu import JumpReLU
from groupsae.sae.matryoshka import Matryoshka
from groupsae.sae.relu import ReLU
from groupsae.sae.topk import TopK

L1 = {"l1_coefficient": 0.3, "sparsity_warmup": 0.0}
# what suits so few latents, and full penalties from the first step on
FAMILY: dict[str, tuple[type[SAE], dict[str, Any]]] = {
    "topk": (TopK, {"k": 3}),
    "batchtopk": (BatchTopK, {"k": 3}),
    "matryoshka": (Matryoshka, {"k": 3, "prefixes": [0.25, 0.5, 1.0]}),
    "jumprelu": (
        JumpReLU, {"target_l0": 3, "sparsity_warmup": 0.0, "threshold": 0.1, "bandwidth": 0.1}
    ),
    "relu": (ReLU, L1),
    "gated": (Gated, L1),
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(kind: str, **changes: Any) -> SAE:
    """Return an SAE of 6 dimensions and 24 latents, but for the changes."""
    architecture, values = FAMILY[kind]
    fresh = {"d_model": 6, "expansion": 4, "generator": generator()}
    return architecture(**(fresh | values | changes))


def trained(kind: str, noise: float = 0.3, **changes: Any) -> Any:
    """Return an SAE in float64 away from its symmetric start: untied, with biases."""
    sae = make(kind, **changes).double()
    with torch.no_grad():
        for number, parameter in enumerate(sae.parameters()):
            drawn = torch.randn(parameter.shape, generator=generator(number), dtype=torch.float64)
            parameter += noise * drawn
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.4)
    sae.normalize_decoder()
    return sae
