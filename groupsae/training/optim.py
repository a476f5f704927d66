"""Adam with the width law of the paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Adam:
    """The optimiser of every SAE.

    lr = base_lr / sqrt(d_sae / base_d_sae), constant (paper: 2e-4 at 2^14 latents).

    Args:
        base_lr: learning rate at base_d_sae latents.
        base_d_sae: where base_lr holds.
        betas: of Adam.
        eps: of Adam.
        clip_norm: largest gradient norm of one SAE, after the projection (the reference code
            clips at 1.0, unmentioned in the paper).
    """

    base_lr: float
    base_d_sae: int
    betas: Sequence[float]
    eps: float
    clip_norm: float

    def lr(self, d_sae: int) -> float:
        """Return the learning rate of an SAE with `d_sae` latents."""
        return self.base_lr / math.sqrt(d_sae / self.base_d_sae)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return one fused Adam over named parameter groups, each with its own `lr`."""
        return torch.optim.Adam(
            groups, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=True
        )
