"""Adam with the width law of the paper."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groupsae.runtime.errors import UserError, check_choice

DECAYS: dict[str, Callable[[float], float]] = {  # share of the decay that is left -> factor
    "constant": lambda _left: 1.0,
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
}


@dataclass(frozen=True, kw_only=True)
class Adam:
    """The optimiser of every SAE.

    lr = base_lr / sqrt(d_sae / base_d_sae) (paper: 2e-4 at 2^14 latents), times a factor that
    rises from zero at the start and falls to zero at the end, each over a share of the training.

    Args:
        base_lr: learning rate at base_d_sae latents.
        base_d_sae: number of latents at which the rate is base_lr.
        betas: Adam's betas.
        eps: Adam's epsilon.
        clip_norm: largest gradient norm of one SAE, after the projection (the reference code
            clips at 1.0, unmentioned in the paper).
        warmup: share of the training in which the rate rises, linearly (paper: 0).
        decay: shape of the decay: constant (not at all, as in the paper), linear or cosine.
        decay_share: share of the training, at its end, in which it falls.

    Raises:
        UserError: warmup, decay or decay_share is not one of these.
    """

    base_lr: float = 2e-4
    base_d_sae: int = 2**14
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup: float = 0.0
    decay: str = "constant"
    decay_share: float = 0.2

    def __post_init__(self) -> None:
        """Check the schedule."""
        check_choice("optim.decay", self.decay, DECAYS)
        for name in ("warmup", "decay_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"optim.{name} is {value}; it must lie between 0 and 1.")

    def factor(self, step: int, num_steps: int) -> float:
        """Return the factor of the learning rate at a step; it is never zero."""
        warmup, decay = self.warmup * num_steps, self.decay_share * num_steps
        rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
        left = min(1.0, (num_steps - step) / decay) if decay > 0 else 1.0
        return rise * DECAYS[self.decay](left)

    def schedule(self, optimizer: torch.optim.Optimizer, step: int, num_steps: int) -> None:
        """Set the rate of every parameter group: a function of the position, it has no state."""
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * self.factor(step, num_steps)

    def lr(self, d_sae: int) -> float:
        """Return the learning rate of an SAE with `d_sae` latents."""
        return self.base_lr / math.sqrt(d_sae / self.base_d_sae)

    def build(
        self,
        groups: list[dict[str, Any]],
        before: Callable[[], Sequence[Tensor] | None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> "SkippingAdam":
        """Return one fused Adam over named parameter groups, each with its own `lr`."""
        for group in groups:
            group["full_lr"] = group["lr"]
        adam = SkippingAdam(groups, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=True)
        adam.before, adam.after = before, after
        return adam


class SkippingAdam(torch.optim.Adam):
    """An Adam that can leave parameter groups unchanged: weights, moments and step count.

    Attributes:
        before: called when gradients are known; returns for each group 1.0, on its device, if it
            takes no part in the step, otherwise 0.0 (fused Adam reads it as the gradient scaler's
            `found_inf`), or None if all do.
        after: called at the end of a step.
    """

    before: Callable[[], Sequence[Tensor] | None]
    after: Callable[[], None]
    found_inf: Tensor | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step as Adam does, or group by group where groups may be left out."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        left_out = self.before()
        if left_out is None:
            super().step()
        else:
            groups = self.param_groups
            try:
                for group, mark in zip(groups, left_out, strict=True):
                    self.param_groups, self.found_inf = [group], mark
                    super().step()
            finally:
                self.param_groups, self.found_inf = groups, None
        self.after()
        return loss
