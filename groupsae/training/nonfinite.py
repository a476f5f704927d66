"""Steps whose loss or gradient is not finite: their origin, and the report about them."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from groupsae.data.activations import ActivationDataModule
from groupsae.runtime.errors import UserError
from groupsae.training.parallel.collect import gather

ACTIONS = ("stop", "skip")
# A batch that overflows is rare. So many in a row mean that no batch is any good: weights that
# have grown too large, or a broken language model.
MOST_IN_A_ROW = 100
AT_ONCE = 4  # layers in a second forward: next to gradients there may be little memory left


class RunningStats(NamedTuple):
    """Figures of a group over the steps since they were last logged.

    Attributes:
        values: figure -> mean over the steps, or its present value.
        weights: True if all weights are finite.
        steps: number of steps.
        finite: steps before the first whose loss was not finite; such a loss spoils the weights,
            so no later one is finite either.
        skipped: steps left out since the run began: how many, how many in a row, the last.
    """

    values: dict[str, float]
    weights: bool
    steps: int
    finite: int
    skipped: list[int]


def check_finite(module: Any, stats: Mapping[str, RunningStats]) -> None:
    """Raise UserError if values or weights of a group are NaN or infinite; names step and layers.

    `stats` (by group) are the same in all processes: all raise, or none.
    """
    for name, stat in stats.items():
        if stat.weights and all(map(math.isfinite, stat.values.values())):
            continue
        step = min(module.global_step, module.global_step - stat.steps + stat.finite + 1)
        found, layers = look_again(module, step)
        advice = "try model.dtype=float32" if layers else "lower optim.base_lr"
        raise UserError(
            f"{name}: the loss is not a finite number at step {step} of "
            f"{module.trainer.datamodule.num_steps}: {found}. Nothing of it was saved; earlier "
            f"checkpoints are intact. To resume from the last one, {advice}, or leave such steps "
            "out with nonfinite=skip, and give the same command again."
        )


def check_skips(module: Any, stats: Mapping[str, RunningStats]) -> None:
    """Warn of the first steps left out; raise UserError if a group takes none any more."""
    for name, stat in stats.items():
        times, in_a_row, last = stat.skipped
        if "skipped" not in stat.values or times == 0:
            continue
        if in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"{name}: {MOST_IN_A_ROW} steps in a row or more had no finite loss or gradient, "
                f"up to step {last} of {module.trainer.datamodule.num_steps}: "
                f"{look_again(module, last)[0]}. They were left out (nonfinite=skip); earlier "
                "checkpoints are intact. Lower optim.base_lr, or try model.dtype=float32."
            )
        if module.joint.warned:
            continue
        module.joint.warned = True
        found, _ = look_again(module, last)
        if module.trainer.is_global_zero:
            count = "a step was" if times == 1 else f"{times} steps were"
            warnings.warn(
                f"{name}: {count} left out (nonfinite=skip), the last of them step {last}, for a "
                f"loss or gradient that is not finite: {found}. More are counted in "
                "train/skipped.",
                stacklevel=2,
            )


def look_again(module: Any, step: int) -> tuple[str, Sequence[int]]:
    """Return which layers' activations are not finite in a step: as a sentence, and as numbers."""
    layers = layers_not_finite(module.trainer.datamodule, step)
    if not layers:
        return "the activations of that step are finite, so the training itself diverged", []
    which = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    return f"the activations of {which} are not finite in that step", layers


@torch.no_grad()
def layers_not_finite(data: ActivationDataModule, step: int) -> list[int]:
    """Return the layers whose activations are not finite in a step of the training.

    The text of the step is run through the language model again; every process takes its share,
    and all of them get the same answer.
    """
    layers = sorted(set().union(*gather(data.used_layers())))
    found = torch.zeros(len(layers), device=data.device)
    tokens = next(iter(data.loader("train", step, first_step=step - 1)))
    for first in range(0, len(layers), AT_ONCE):
        some = layers[first : first + AT_ONCE]
        for batch in data.every_layer(tokens, some):
            finite = [batch.rows([layer])[0].isfinite().all() for layer in some]
            found[first : first + AT_ONCE] += ~torch.stack(finite)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
    return [layer for layer, times in zip(layers, found.tolist(), strict=True) if times > 0]
