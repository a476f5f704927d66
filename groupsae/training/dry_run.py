"""`dry_run=true`: what a run will need, before anything is packed, measured or trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from groupsae.data.activations import ActivationDataModule
from groupsae.grouping.choices import Choice
from groupsae.grouping.plan import GroupPlan
from groupsae.suite.groups_file import load_plan
from groupsae.training.checkpoints.folder import KEPT
from groupsae.training.forecast import FLOAT, bytes_free, bytes_needed
from groupsae.training.profile import Trial, run_trial
from groupsae.training.suite import GroupSAESuite


@dataclass(frozen=True)
class Needs:
    """What one way to group the layers needs; bytes and seconds of one process unless said.

    Attributes:
        num_saes: trained at once.
        parameters: of all SAEs that the process holds, a number.
        weights: of the SAEs.
        gradients: of them.
        optimizer: Adam's two moments.
        activations: rows of one step that the language model hands over.
        free: memory that is left for the SAEs and the step.
        trial: what a few steps took; None where they would not fit.
        tokens: of the whole run, per SAE, over all processes.
        steps: of the whole run.
        seconds: of training, of validations and of measuring the layers.
        run_folder: on disk, at most at once, over all processes.
        text: packed tokens on disk, at most; shared between runs.
        stored: activations on disk (data.cache), at most; shared between runs; 0 without a store.
    """

    num_saes: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    free: int
    trial: Trial | None
    tokens: int
    steps: int
    seconds: dict[str, float]
    run_folder: int
    text: int
    stored: int


def plans_of(choice: Choice, num_layers: int, folder: Path) -> list[GroupPlan]:
    """Return the plan of a run, or where distances must decide it those of fewest and most SAEs.

    Args:
        choice: the rule that makes the groups.
        num_layers: L.
        folder: of the run; its `groups.json`, if it was begun before, decides.
    """
    known = load_plan(folder)
    if known is not None:
        return [known]
    apart = np.abs(np.subtract.outer(np.arange(num_layers), np.arange(num_layers)))
    # no two layers differ; and all are as far apart as can be, neighbours a little less, so that
    # groups grow evenly and as many as can be have more than one layer
    far = (apart > 0) * (0.99 + 0.01 * apart / num_layers)
    plans = [choice.plan(1e-6 * np.minimum(apart, 1)), choice.plan(far)]
    plans.sort(key=lambda plan: len(plan.members))
    return plans[:1] if len(plans[0].members) == len(plans[1].members) else plans


def needs(
    suite: GroupSAESuite,
    data: ActivationDataModule,
    plan: GroupPlan,
    device: torch.device,
    *,
    processes: int,
    own: Sequence[int] | None,
    eval_every: int,
    checkpoint_every: int,
    calibration_tokens: int,
) -> Needs:
    """Return what a run of this plan needs; a few steps are tried, if they fit.

    Args:
        suite: makes the SAEs.
        data: with the language model loaded.
        plan: what to train.
        device: that trains.
        processes: that share a step.
        own: numbers in the plan of the SAEs that the process with most of them holds, where they
            are spread over the processes; None where each process holds all.
        eval_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        calibration_tokens: to measure the layers on.
    """
    held = range(len(plan.members)) if own is None else own
    widths = [plan.members[i].width for i in held]
    sae, every = suite.size(1.0), sum(planned.width for planned in plan.members)
    parameters = round(sae.parameters * sum(widths))
    weights = FLOAT * parameters
    sharing = processes if own is None else 1  # of the SAEs' rows
    free = bytes_free(device, processes if device.type == "cpu" else 1)
    fits = bytes_needed(suite, data, widths, sharing) <= free
    trial = run_trial(suite, data, plan, device, processes, own) if fits else None
    steps = data.num_steps
    seconds = {}
    if trial is not None:
        validations = steps // min(eval_every, steps) + 1  # one more at the end
        seconds = {
            "training": steps * trial.step_seconds,
            "validation": validations * data.heldout_tokens * trial.heldout_seconds / processes,
            "measuring the layers": calibration_tokens * trial.calibration_seconds / processes,
        }
    # a counter of 8 bytes for each latent beside weights and moments
    whole = FLOAT * round(sae.parameters * every)
    checkpoint = 3 * whole + 8 * round(sae.d_sae * every)
    written = -(-steps // checkpoint_every)  # the last one after the last step
    slots = {tuple(plan.members[i].layers) for i in held}
    return Needs(
        num_saes=len(plan.members),
        parameters=parameters,
        weights=weights,
        gradients=weights,
        optimizer=2 * weights,
        activations=FLOAT * (data.tokens_per_step // sharing) * suite.d_model * len(slots),
        free=free,
        trial=trial,
        tokens=steps * data.tokens_per_step,
        steps=steps,
        seconds=seconds,
        run_folder=min(KEPT + 1, written) * checkpoint + whole,  # one is being written
        text=4 * (data.packing.max_tokens or 0),
        stored=_stored_bytes(data, plan, calibration_tokens),
    )


def _stored_bytes(data: ActivationDataModule, plan: GroupPlan, calibration_tokens: int) -> int:
    """Return what the run's activations take on disk; text that comes again is not taken off."""
    if not data.is_stored:
        return 0
    used = len({layer for planned in plan.members for layer in planned.layers})
    rows = used * (data.num_steps * data.tokens_per_step + data.heldout_tokens)
    rows += plan.num_layers * calibration_tokens
    width = getattr(torch, data.stored_dtype).itemsize
    return int(rows * data.lm.geometry.d_model * width)
