"""A few real steps on made-up tokens, before a run: what it takes in memory and in time."""

import gc
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupsae.data.activations import ActivationDataModule
from groupsae.data.batch import ActivationBatch
from groupsae.grouping.angles import AngularDistance
from groupsae.grouping.moments import LayerMoments
from groupsae.grouping.plan import GroupPlan
from groupsae.training.group import GroupSAE
from groupsae.training.suite import GroupSAESuite

SECONDS = 5.0  # of measured steps, at least LEAST of them
LEAST, MOST = 3, 50


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        peak: most memory of the process (on a GPU, of the device by this process), in bytes.
        peak_dead: the same once half of all latents are dead and AuxK, where there is one, works
            on them.
        steps: that were measured.
        step_seconds: of one step of training.
        heldout_seconds: of one held-out token.
        calibration_seconds: of one calibration token.
    """

    peak: int
    peak_dead: int
    steps: int
    step_seconds: float
    heldout_seconds: float
    calibration_seconds: float


def step_together(
    members: list[GroupSAE],
    optimizers: list[torch.optim.Optimizer],
    batch: ActivationBatch,
    dead: float = 0.0,
) -> None:
    """Do what a step of training does with these members, in its order of memory.

    Args:
        members: to train.
        optimizers: one for each.
        batch: of activations.
        dead: share of the latents that is taken for dead.
    """
    rows = [member.rows(batch) for member in members]
    losses = [
        m.step(*row, m.moments(*row), round(dead * m.sae.d_sae))
        for m, row in zip(members, rows, strict=True)
    ]
    for optimizer in optimizers:  # not earlier: gradients live through the next forward
        optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    for member, optimizer in zip(members, optimizers, strict=True):
        member.configure_gradient_clipping(optimizer)
        optimizer.step()
        member.sae.normalize_decoder()


def run_trial(
    suite: GroupSAESuite,
    data: ActivationDataModule,
    plan: GroupPlan,
    device: torch.device,
    processes: int,
    own: Sequence[int] | None,
) -> Trial:
    """Train the SAEs of a plan for a few steps and forget them again.

    Tokens are drawn at random: no text has to be packed, and speed does not depend on them. Norm
    factors are one.

    Args:
        suite: makes the SAEs; is not changed.
        data: with the language model loaded.
        plan: what to train.
        device: that trains.
        processes: that share a step; this one does its share.
        own: numbers in the plan of this process's SAEs, which get the rows of all processes (here
            its own rows as often); None where it holds all SAEs and gets its share of the rows.
    """
    suite.set_plan(plan, dict.fromkeys(range(plan.num_layers), 1.0), own)
    slots, mine = plan.slots, suite.slots_of(suite.own)
    held = [plan.members[i] for i in suite.own]
    members = [suite.make_member(each, mine).to(device) for each in held]
    rows = torch.tensor([slots.index(slot) for slot in mine], device=device)
    optimizers = [member.configure_optimizers() for member in members]
    blocks = data.blocks_per_step // processes
    vocab, context = data.lm.geometry.vocab_size, data.packing.context
    tokens = torch.randint(vocab, (blocks, context), generator=torch.Generator().manual_seed(0))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def arriving() -> ActivationBatch:
        batch = data.activations(tokens, slots)
        return batch if own is None else _of_all(batch, rows, processes)

    calibration = _calibration(data, tokens, device)
    steps, began, passed = -1, 0.0, 0.0
    while steps < LEAST or (passed < SECONDS and steps < MOST):  # the first one warms up
        step_together(members, optimizers, arriving())
        steps, passed = steps + 1, now(device) - began
        if steps == 0:
            began, passed = now(device), 0.0
    heldout = _heldout(members, data, tokens, device)
    alive = peak(device)
    step_together(members, optimizers, arriving(), dead=0.5)
    trial = Trial(alive, peak(device), steps, passed / steps, heldout, calibration)
    del members, optimizers
    gc.collect()
    return trial


def _of_all(batch: ActivationBatch, slots: Tensor, processes: int) -> ActivationBatch:
    """Return what would come in if all processes had these rows."""
    kept, tokens = batch.kept, batch.acts.shape[1]
    if kept is not None:
        kept = torch.cat([kept + i * tokens for i in range(processes)])
    return ActivationBatch(
        batch.acts[slots].repeat(1, processes, 1),
        batch.layers[slots].repeat(1, processes),
        None if batch.keep is None else batch.keep[slots].repeat(1, processes),
        kept,
    )


def _calibration(data: ActivationDataModule, tokens: Tensor, device: torch.device) -> float:
    """Return the seconds of measuring one token."""
    geometry = data.lm.geometry
    size = {"num_layers": geometry.num_layers, "d_model": geometry.d_model}
    metrics = [
        LayerMoments(**size).to(device),
        AngularDistance(**size, centring="none").to(device),
    ]
    part, every = tokens[: data.blocks_per_forward], list(range(geometry.num_layers))
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        began = now(device)
        for batch in data.every_layer(part, every):
            for metric in metrics:
                metric.update(batch.acts, batch.everywhere())
        seconds = now(device) - began
    return seconds / part.numel()


def _heldout(
    members: list[GroupSAE], data: ActivationDataModule, tokens: Tensor, device: torch.device
) -> float:
    """Return the seconds of validating one token."""
    layers = sorted({layer for member in members for layer in member.layers})
    part = tokens[: data.blocks_per_forward]
    began = now(device)
    for batch in data.every_layer(part, layers):
        for member in members:
            for layer in member.layers:
                x, _ = batch.rows(layers.index(layer))
                x_hat, _ = member.reconstruct(x, layer)
                (x - x_hat).square().sum(dtype=torch.float64)
    return (now(device) - began) / part.numel()


def now(device: torch.device) -> float:
    """Return the time at which the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device) -> int:
    """Return the most memory this process ever had: of the GPU, or of the machine, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
