"""What becomes of a step whose numbers are not finite: the run stops, or it is left out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from groupsae.data.activations import ActivationDataModule
from groupsae.runtime.errors import UserError
from groupsae.training.parallel.collect import gather

if TYPE_CHECKING:
    from groupsae.training.group import GroupSAE

ACTIONS = ("stop", "skip")
# A batch that overflows is rare. So many in a row mean that no batch is any good: weights that
# have grown too large, or a broken language model.
MOST_IN_A_ROW = 100
AT_ONCE = 4  # layers in a second look: beside gradients and all else there may be little room


def check_nonfinite(action: str) -> None:
    """Raise UserError if there is no such action."""
    if action not in ACTIONS:
        raise UserError(f"nonfinite is {action!r}: use {' or '.join(ACTIONS)}.")


class Undo:
    """Takes a step back for the members that must leave it out; the host never knows which.

    Weights and Adam's moments are spared by the optimiser (`SkippingAdam`); this is for the
    counters, thresholds and sums that a step changes before its gradient is known.

    Args:
        members: before the step.
    """

    def __init__(self, members: Sequence["GroupSAE"]) -> None:
        self.members = members
        self.before = [[buffer.clone() for buffer in m.buffers()] for m in members]
        self.bad = torch.empty(0)

    def note_losses(self, bad: Bool[Tensor, " member"]) -> None:
        """Take notice of the members whose loss is not finite, in any process."""
        self.bad = bad

    def settle(self, norms: Sequence[Tensor], step: int) -> list[Tensor]:
        """Bring back what was there for members whose loss or gradient is not finite.

        Args:
            norms: of each member's gradient, over all processes.
            step: number of the step, the first being 1.

        Returns:
            For each member 1.0 if it leaves the step out, otherwise 0.0.
        """
        self.bad = self.bad | ~torch.stack(list(norms)).isfinite()
        for member, before, bad in zip(self.members, self.before, self.bad, strict=True):
            for buffer, old in zip(member.buffers(), before, strict=True):
                buffer.copy_(torch.where(bad, old, buffer))
            times, in_a_row, last = member.skipped.unbind()
            last = torch.where(bad, torch.full_like(last, step), last)
            member.skipped.copy_(torch.stack([times + bad, (in_a_row + 1) * bad, last]))
        self.before = []
        return list(self.bad.float().unbind())

    @torch.no_grad()
    def normalize_decoders(self) -> None:
        """Normalise the decoders, but where the step was left out: that would round them anew."""
        for member, bad in zip(self.members, self.bad, strict=True):
            weights = [getattr(member.sae, name) for name in member.sae.normalized]
            before = [each.clone() for each in weights]
            member.sae.normalize_decoder()
            for each, old in zip(weights, before, strict=True):
                each.copy_(torch.where(bad, old, each))


@torch.no_grad()
def layers_not_finite(data: ActivationDataModule, step: int) -> list[int]:
    """Return the layers whose activations are not finite in a step of the training.

    The text of the step is run through the language model again; every process looks at its
    share, and all of them get the same answer.

    Args:
        data: the stream.
        step: number of the step, the first being 1.
    """
    layers = sorted(set().union(*gather(data.used_layers())))
    found = torch.zeros(len(layers), device=data.device)
    tokens = next(iter(data.loader("train", step, data.seed, first_step=step - 1)))
    for first in range(0, len(layers), AT_ONCE):
        some = layers[first : first + AT_ONCE]
        for batch in data.every_layer(tokens, some):
            finite = [batch.rows(slot)[0].isfinite().all() for slot in range(len(some))]
            found[first : first + AT_ONCE] += ~torch.stack(finite)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
    return [layer for layer, times in zip(layers, found.tolist(), strict=True) if times > 0]


def where(layers: Sequence[int]) -> str:
    """Return what a second look at the activations of a step has found."""
    if not layers:
        return "the activations of that step are finite, so the training itself diverged"
    which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
    return f"the activations of {which} are not finite in that step"


def stopped(name: str, step: int, steps: int, layers: Sequence[int]) -> str:
    """Return why a run stops.

    Args:
        name: of the member.
        step: the first step whose loss or weights are not finite.
        steps: of the whole run.
        layers: what `layers_not_finite` found there.
    """
    mend = (
        "try model.dtype=float32, or leave such steps out with nonfinite=skip"
        if layers
        else "lower optim.base_lr, or leave such steps out with nonfinite=skip"
    )
    return (
        f"{name}: the loss is not a finite number at step {step} of {steps}: {where(layers)}. "
        f"Nothing of it was saved, earlier checkpoints are whole: {mend} (the same command goes "
        "on from the last checkpoint)."
    )


def too_many(name: str, step: int, steps: int, layers: Sequence[int]) -> str:
    """Return why a run that leaves steps out stops all the same; arguments as in `stopped`."""
    return (
        f"{name}: {MOST_IN_A_ROW} steps in a row or more had no finite loss or gradient, up to "
        f"step {step} of {steps}: {where(layers)}. They were left out (nonfinite=skip), earlier "
        "checkpoints are whole: lower optim.base_lr, or try model.dtype=float32."
    )


def left_out(name: str, times: int, step: int, layers: Sequence[int]) -> str:
    """Return what is said when a step is left out for the first time."""
    count = "a step was" if times == 1 else f"{times} steps were"
    return (
        f"{name}: {count} left out (nonfinite=skip), the last of them step {step}, for a loss or "
        f"gradient that is not finite: {where(layers)}. More are counted in train/skipped."
    )
