"""Steps whose loss or gradient is not finite: where they come from, and what is reported."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from groupsae.data.activations import ActivationDataModule
from groupsae.runtime.errors import UserError
from groupsae.training.parallel.collect import gather

ACTIONS = ("stop", "skip")
# A batch that overflows is rare. So many in a row mean that no batch is any good: weights that
# have grown too large, or a broken language model.
MOST_IN_A_ROW = 100
AT_ONCE = 4  # layers in a second forward: next to gradients there may be little memory left


def check_nonfinite(action: str) -> None:
    """Raise UserError if there is no such action."""
    if action not in ACTIONS:
        raise UserError(f"nonfinite is {action!r}: use {' or '.join(ACTIONS)}.")


def check_finite(module: Any, name: str, values: Iterable[float], steps: int, finite: int) -> None:
    """Raise UserError if a value of a group is NaN or infinite; names step and layers.

    Every process has to ask about the same values.

    Args:
        module: that is being fitted.
        name: of the group.
        values: sums over the steps since last logged, or over the weights.
        steps: since last logged.
        finite: how many of them came before the first whose loss was not finite.
    """
    if all(map(math.isfinite, values)):
        return
    data = module.trainer.datamodule
    step = min(module.global_step, module.global_step - steps + finite + 1)
    layers = layers_not_finite(data, step)
    advice = "try model.dtype=float32" if layers else "lower optim.base_lr"
    raise UserError(
        f"{name}: the loss is not a finite number at step {step} of {data.num_steps}: "
        f"{_found(layers)}. Nothing of it was saved; earlier checkpoints are intact. To resume "
        f"from the last one, {advice}, or leave such steps out with nonfinite=skip, and give the "
        "same command again."
    )


def check_skips(module: Any, name: str, times: int, in_a_row: int, last: int) -> None:
    """Warn when the first step is left out; raise UserError if a group leaves out all steps.

    Args:
        module: that is being fitted.
        name: of the group.
        times: steps that it has left out.
        in_a_row: of them, without one between that it took.
        last: number of the last.
    """
    if in_a_row < MOST_IN_A_ROW and (times == 0 or module.joint.warned):
        return
    data = module.trainer.datamodule
    found = _found(layers_not_finite(data, last))
    if in_a_row >= MOST_IN_A_ROW:
        raise UserError(
            f"{name}: {MOST_IN_A_ROW} steps in a row or more had no finite loss or gradient, up "
            f"to step {last} of {data.num_steps}: {found}. They were left out (nonfinite=skip); "
            "earlier checkpoints are intact. Lower optim.base_lr, or try model.dtype=float32."
        )
    module.joint.warned = True
    if module.trainer.is_global_zero:
        count = "a step was" if times == 1 else f"{times} steps were"
        warnings.warn(
            f"{name}: {count} left out (nonfinite=skip), the last of them step {last}, for a loss "
            f"or gradient that is not finite: {found}. More are counted in train/skipped.",
            stacklevel=2,
        )


@torch.no_grad()
def layers_not_finite(data: ActivationDataModule, step: int) -> list[int]:
    """Return the layers whose activations are not finite in a step of the training.

    The text of the step is run through the language model again; every process takes its share,
    and all of them get the same answer.

    Args:
        data: the stream.
        step: number of the step, the first being 1.
    """
    layers = sorted(set().union(*gather(data.used_layers())))
    found = torch.zeros(len(layers), device=data.device)
    tokens = next(iter(data.loader("train", step, first_step=step - 1)))
    for first in range(0, len(layers), AT_ONCE):
        some = layers[first : first + AT_ONCE]
        for batch in data.every_layer(tokens, some):
            finite = [batch.rows(slot)[0].isfinite().all() for slot in range(len(some))]
            found[first : first + AT_ONCE] += ~torch.stack(finite)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
    return [layer for layer, times in zip(layers, found.tolist(), strict=True) if times > 0]


def _found(layers: Sequence[int]) -> str:
    """Return what running a step's text again has shown."""
    if not layers:
        return "the activations of that step are finite, so the training itself diverged"
    which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
    return f"the activations of {which} are not finite in that step"
