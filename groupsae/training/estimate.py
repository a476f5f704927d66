"""What a run needs before it starts: memory by arithmetic, and a trial of the training step."""

import gc
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import psutil
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from groupsae.data.activations import ActivationDataModule
from groupsae.data.batch import ActivationBatch
from groupsae.grouping.angles import AngularDistance
from groupsae.grouping.choices import Choice
from groupsae.grouping.moments import LayerMoments
from groupsae.grouping.plan import GroupPlan, PlannedSAE
from groupsae.runtime.compat import disable_signal_handling
from groupsae.runtime.errors import UserError
from groupsae.runtime.memory import hand_back_freed_memory
from groupsae.suite.groups_file import load_plan
from groupsae.training.checkpoints.folder import KEPT
from groupsae.training.suite import GroupSAESuite, Size

FLOAT = 4  # bytes
STATE = 4  # weights, gradients and Adam's two moments
ROWS = 4  # raw and scaled activations, reconstruction and error wait for the backward pass
MAPS = 6  # rows more where each layer has something of its own: sorted, centred, mapped, and back
WIDE = 3  # pre-activations, their gradient and a temporary, of one SAE at a time
CONTROL_GROUP = Path("/sys/fs/cgroup")
LEAST, MOST = 3, 50  # measured steps of a trial
SECONDS = 5.0  # that a dry run measures, between LEAST and MOST steps
SHARE = 20  # at most a twentieth of the run's steps: a trial is shorter than the run

MakeBatch = Callable[[], ActivationBatch]


# ---- by arithmetic ----------------------------------------------------------------------------


def bytes_needed(
    suite: GroupSAESuite, data: ActivationDataModule, saes: Sequence[PlannedSAE], world_size: int
) -> int:
    """Return the memory in bytes that one process needs to train some SAEs.

    It counts weights with gradients and optimiser state, and the activations of one step. The
    language model is not included: it is already loaded, so its memory is no longer free.
    `world_size` processes share a step's rows.
    """
    sizes, tokens = suite.sizes_of(saes), data.tokens_per_step // world_size
    shown = [
        (size, data.rows_per_token(sae.layers)) for size, sae in zip(sizes, saes, strict=True)
    ]
    parameters = sum(size.parameters for size in sizes)
    rows = suite.d_model * sum(count * (ROWS + MAPS * size.maps) for size, count in shown)
    # the backward pass starts after all losses, so the tensors kept for it add up
    widest = max((size.d_sae * count for size, count in shown), default=0)
    wide = widest * WIDE + sum(size.d_sae * count * size.kept_wide for size, count in shown)
    return round(FLOAT * (parameters * STATE + tokens * (rows + wide)))


def bytes_free(device: torch.device, processes: int) -> int:
    """Return the memory in bytes that one process can still have on a device.

    Memory that this process has freed but not yet returned counts as free. On a CPU the
    `processes` of this machine share its memory, or what their control group may use of it.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    hand_back_freed_memory()
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control group, or "max": no limit
        limit, used = (
            int((CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current")
        )
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        pages = dict(line.split() for line in lines)
        free = min(free, limit - used + int(pages["inactive_file"]))  # the kernel frees those
    return free // processes


def refuse(needed: int, free: int, num_saes: int, device: object) -> None:
    """Raise UserError if the SAEs do not fit into the free memory; it names values to reduce."""
    if needed > free:
        raise UserError(
            f"training {num_saes} SAE{'s' * (num_saes > 1)} at once needs about "
            f"{needed / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB free. Lower "
            "sae.expansion or stream.blocks_per_step, train fewer SAEs (groups.rules with one "
            "rule, groups.smaller=[]), or the numbers of groups one after the other (-m "
            "groups=count groups.num_groups=1,2,3)."
        )


# ---- by a trial -------------------------------------------------------------------------------


class Trial(L.Callback):
    """Times the training step of a few SAEs of a plan, and their memory."""

    def __init__(
        self, seconds: float, heldout: Callable[[], Iterable[ActivationBatch]], num_steps: int
    ) -> None:
        self.seconds, self.heldout = seconds, heldout
        self.most = max(LEAST, min(MOST, num_steps // SHARE))
        self.steps = -1  # measured ones; the first one warms up
        self.step_seconds = self.heldout_seconds = 0.0  # of training, of validating one batch
        self.sae_seconds = 0.0  # the part of a step after the batch has arrived
        # most memory of the process (of the device, on a GPU) in bytes; and once half of all
        # latents are dead and AuxK works on them
        self.peak = self.peak_dead = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Start the clock of the SAEs."""
        self._arrived = now(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Stop the clock; after enough steps validate, then take one step with dead latents."""
        device, ended = pl_module.device, now(pl_module.device)
        if self.peak:
            self.peak_dead = peak(device)
            trainer.should_stop = True
            return
        self.steps += 1
        if self.steps == 0:
            self._began = ended
            return
        self.sae_seconds += ended - self._arrived
        passed = ended - self._began
        if self.steps < LEAST or (passed < self.seconds and self.steps < self.most):
            return
        self.step_seconds, self.sae_seconds = passed / self.steps, self.sae_seconds / self.steps
        pl_module.on_validation_epoch_start()
        began = now(device)
        pl_module.validation_step(self.heldout(), 0)
        self.heldout_seconds = now(device) - began
        self.peak = peak(device)
        for member in pl_module.members():
            member.tokens_since_fired.zero_()[: member.sae.d_sae // 2] = member.dead_after
        pl_module.joint.num_dead = None  # to be counted again


class TrialData(L.LightningDataModule):
    """Gives a trial its batches, as the data module of a run does."""

    def __init__(self, make: MakeBatch, num_steps: int) -> None:
        super().__init__()
        self.make, self.num_steps = make, num_steps

    def train_dataloader(self) -> Iterable[int]:
        """Return numbers in place of batches of tokens."""
        return range(MOST + 2)

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch: int, dataloader_idx: int) -> ActivationBatch:
        """Return the activations of a batch."""
        return self.make()


def run_trial(
    suite: GroupSAESuite,
    plan: GroupPlan,
    own: Sequence[int],
    make: MakeBatch,
    device: torch.device,
    *,
    num_steps: int,
    seconds: float = 0.0,
    heldout: Callable[[], Iterable[ActivationBatch]] = tuple,
) -> Trial:
    """Train copies of some SAEs of a plan for a few steps, by Lightning, and discard them.

    `own` are the numbers in the plan of those to train, `make` makes a batch with the rows of
    their slots, and `heldout` the parts of a validation batch.
    """
    copy = GroupSAESuite(
        sae=suite.make_sae, b_dec_start=suite.b_dec_start, **suite.make_group.keywords
    )
    ones = dict.fromkeys(range(plan.num_layers), 1.0)
    means = dict.fromkeys(range(plan.num_layers), torch.zeros(suite.d_model))
    copy.set_plan(plan, getattr(suite, "norm_factors", ones), own, means)
    trial, cuda = Trial(seconds, heldout, num_steps), device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with isolate_rng():
        trainer = L.Trainer(
            accelerator="gpu" if cuda else "cpu",
            devices=[device.index or 0] if cuda else 1,
            max_epochs=1,
            limit_val_batches=0,
            log_every_n_steps=10**9,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[trial],
        )
        disable_signal_handling(trainer)
        trainer.fit(copy, datamodule=TrialData(make, num_steps))
    del copy, trainer
    gc.collect()
    return trial


def rows_of_owner(
    batch: ActivationBatch, slots: Sequence[list[int]], processes: int
) -> ActivationBatch:
    """Return the rows of some slots as if every process had sent the rows of this one."""
    places = [place for place, slot in enumerate(batch.slots) if slot in slots]
    if processes == 1 and len(places) == len(batch.slots):
        return batch
    kept, tokens = batch.kept, batch.acts.shape[1]
    if kept is not None:
        kept = torch.cat([kept + i * tokens for i in range(processes)])
    return ActivationBatch(
        [batch.slots[place] for place in places],
        batch.acts[places].repeat(1, processes, 1),
        batch.layers[places].repeat(1, processes),
        None if batch.keep is None else batch.keep[places].repeat(1, processes),
        kept,
        None
        if batch.sizes is None
        else [
            {layer: processes * count for layer, count in batch.sizes[place].items()}
            for place in places
        ],
    )


def now(device: torch.device) -> float:
    """Return the time in seconds at which the device has finished its work so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: on the GPU, or in the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


# ---- the forecast of a run that trains all groupings -------------------------------------------


def forecast(
    suite: GroupSAESuite, data: ActivationDataModule, device: torch.device, world_size: int
) -> tuple[str, dict[Size, float]]:
    """Return a sentence on what the suite's plan will need, and the seconds of a step by size.

    A small SAE takes longer than its FLOPs suggest, so each size is tried; the suite
    stays as it is. Seconds are those with one row per token.
    """
    plan = suite.plan
    make = data.first_rows(plan.slots, data.blocks_per_step)
    batch = make()  # warms up
    began = now(device)
    for _ in range(LEAST):
        batch = make()
    activation_seconds = (now(device) - began) / LEAST * data.num_steps
    processes = world_size if suite.spread else 1
    steps = {}
    for index, size in enumerate(suite.sizes_of(plan.members)):
        planned = plan.members[index]
        if size not in steps:
            rows = partial(rows_of_owner, batch, [planned.layers], processes)
            trial = run_trial(suite, plan, [index], rows, device, num_steps=data.num_steps)
            steps[size] = trial.sae_seconds / data.rows_per_token(planned.layers)
    own = [plan.members[i] for i in suite.own]
    memory = bytes_needed(suite, data, own, 1 if suite.spread else world_size)
    shown = [data.rows_per_token(planned.layers) for planned in own]
    step = sum(steps[s] * rows for s, rows in zip(suite.sizes_of(own), shown, strict=True))
    seconds = activation_seconds + step * data.num_steps
    sentence = (
        f"{len(plan.members)} SAEs from one stream: about {memory / 1e9:.1f} GB of memory, and by "
        f"a trial of {LEAST} steps {timedelta(seconds=round(seconds))} of training "
        f"({activation_seconds / seconds:.0%} of it the language model's)."
    )
    return sentence, steps


# ---- dry run: before anything is packed, measured or trained ------------------------------------


@dataclass(frozen=True)
class Needs:
    """What one way to group the layers needs; bytes and seconds of one process unless noted."""

    num_saes: int  # trained at once
    parameters: int  # numbers in all SAEs that the process holds
    activations: int  # of one step's rows that the language model hands over
    free: int  # memory that is left for the SAEs and the step
    trial: Trial | None  # measurements of a few steps; None if they do not fit
    tokens: int  # of the run, per SAE, over all processes
    steps: int
    seconds: dict[str, float]  # of training, of validations and of measuring the layers
    run_folder: int  # on disk, at most at once, over all processes
    text: int  # packed tokens on disk, at most; shared between runs
    stored: int  # activations on disk (data.cache), at most; shared between runs


def possible_plans(choice: Choice, num_layers: int, folder: Path) -> list[GroupPlan]:
    """Return the plan of a run, or those of fewest and most SAEs where distances must decide.

    The `groups.json` of a run that was started before decides.
    """
    known = load_plan(folder)
    if known is not None:
        return [known]
    apart = np.abs(np.subtract.outer(np.arange(num_layers), np.arange(num_layers)))
    # no two layers differ; and all are as far apart as possible, neighbours a little less, so
    # that groups grow evenly and as many as possible have more than one layer
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

    The trial runs on random tokens: no text is packed, and speed does not depend on it. The
    language model must be loaded. `own` are the SAEs of the process with most of them, by their
    numbers in the plan; None where each process holds all.
    """
    held = list(range(len(plan.members)) if own is None else own)
    saes, slots = [plan.members[i] for i in held], plan.slots_of(held)
    every = suite.sizes_of(plan.members)
    rows = len(data.each_row(slots))  # of a token
    sharing, senders = (processes, 1) if own is None else (1, processes)
    free = bytes_free(device, processes if device.type == "cpu" else 1)
    trial, seconds, steps = None, {}, data.num_steps
    if bytes_needed(suite, data, saes, sharing) <= free:
        blocks = data.blocks_per_step // processes
        vocab, context = data.lm.geometry.vocab_size, data.packing.context
        draws = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab, (blocks, context), generator=draws)
        part = tokens[: data.blocks_per_forward]
        calibration = _calibration_seconds(data, part, device)
        trial = run_trial(
            suite,
            plan,
            held,
            lambda: rows_of_owner(data.activations(tokens, plan.slots), slots, senders),
            device,
            num_steps=steps,
            seconds=SECONDS,
            heldout=partial(data.every_layer, part, sorted(set().union(*slots))),
        )
        validations = steps // min(eval_every, steps) + 1  # one more at the end
        heldout = validations * data.heldout_tokens * trial.heldout_seconds / part.numel()
        seconds = {
            "training": steps * trial.step_seconds,
            "validation": heldout / processes,
            "measuring the layers": calibration_tokens * calibration / part.numel() / processes,
        }
    weights = FLOAT * sum(size.parameters for size in every)
    checkpoint = 3 * weights + 8 * sum(size.d_sae for size in every)  # 8: each latent's counter
    written = -(-steps // checkpoint_every)  # the last one after the last step
    return Needs(
        num_saes=len(plan.members),
        parameters=sum(size.parameters for size in suite.sizes_of(saes)),
        activations=FLOAT * suite.d_model * (data.tokens_per_step // sharing) * rows,
        free=free,
        trial=trial,
        tokens=steps * data.tokens_per_step,
        steps=steps,
        seconds=seconds,
        run_folder=min(KEPT + 1, written) * checkpoint + weights,  # one is being written
        text=4 * (data.packing.max_tokens or 0),
        stored=_stored_bytes(data, plan, calibration_tokens),
    )


def _calibration_seconds(
    data: ActivationDataModule, tokens: Tensor, device: torch.device
) -> float:
    """Return the seconds of measuring all layers on some blocks of tokens."""
    geometry = data.lm.geometry
    metrics = [
        LayerMoments(num_layers=geometry.num_layers, d_model=geometry.d_model).to(device),
        AngularDistance(num_layers=geometry.num_layers).to(device),
    ]
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        began = now(device)
        for batch in data.every_layer(tokens, list(range(geometry.num_layers))):
            for metric in metrics:
                metric.update(batch.acts, batch.everywhere())
        seconds = now(device) - began
    return seconds


def _stored_bytes(data: ActivationDataModule, plan: GroupPlan, calibration_tokens: int) -> int:
    """Return the bytes of the run's activations on disk; text that repeats counts each time."""
    stored = data.reader.stored_dtype
    if stored is None:
        return 0
    used = len({layer for planned in plan.members for layer in planned.layers})
    rows = used * (data.num_steps * data.tokens_per_step + data.heldout_tokens)
    rows += plan.num_layers * calibration_tokens
    width = getattr(torch, stored).itemsize
    return int(rows * data.lm.geometry.d_model * width)
