"""Memory and time of a run before it starts, by arithmetic and by a short trial."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from groupsae.data.activations import ActivationDataModule
from groupsae.runtime.errors import UserError
from groupsae.training.allocator import hand_back_freed_memory
from groupsae.training.profile import now, step_together
from groupsae.training.suite import GroupSAESuite

FLOAT = 4  # bytes
STATE = 4  # weights, gradients and Adam's two moments
ROWS = 4  # raw and scaled activations, reconstruction and error wait for the backward pass
WIDE = 3  # pre-activations, their gradient and a temporary, of one SAE at a time
TRIAL = 3  # steps
CONTROL_GROUP = Path("/sys/fs/cgroup")


def bytes_needed(
    suite: GroupSAESuite, data: ActivationDataModule, widths: list[float], world_size: int
) -> int:
    """Return the memory in bytes that one process still needs to train SAEs of these widths.

    Counted are weights with gradients and optimiser state, and the activations of one step. The
    language model is loaded before this is asked for, and so is no longer free.

    Args:
        suite: makes the SAEs.
        data: the stream.
        widths: of the SAEs, as shares of the configured number of latents.
        world_size: processes that share a step.
    """
    sae = suite.size(1.0)
    parameters = sae.parameters * sum(widths)
    tokens = data.tokens_per_step // world_size
    rows = tokens * suite.d_model * len(widths) * ROWS
    # what the SAEs keep waits until the summed losses go back
    wide = tokens * sae.d_sae * (max(widths, default=0) * WIDE + sum(widths) * sae.kept_wide)
    return round(FLOAT * (parameters * STATE + rows + wide))


def bytes_free(device: torch.device, processes: int) -> int:
    """Return the memory that one process can still have on a device.

    What this process has freed but not yet handed back counts as free. On a CPU the processes of
    a machine share its memory, or as much of it as their control group may use.

    Args:
        device: that trains.
        processes: on this machine.
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
    """Raise UserError if the SAEs do not fit into the free memory; says what to reduce."""
    if needed > free:
        raise UserError(
            f"training {num_saes} SAEs at once needs about {needed / 1e9:.1f} GB, but {device} "
            f"has {free / 1e9:.1f} GB free. Lower sae.expansion or stream.blocks_per_step, train "
            "fewer SAEs (groups.rules with one rule, groups.smaller=[]), or the numbers of "
            "groups one after the other (-m groups=count groups.num_groups=1,2,3)."
        )


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
        num_saes: trained at once.
        memory: bytes in one process, beside the language model's.
        activation_seconds: the language model's forwards.
        sae_seconds: the steps of all SAEs.
        step_seconds: width of an SAE, as a share of the configured number of latents -> one step.
    """

    num_saes: int
    memory: int
    activation_seconds: float
    sae_seconds: float
    step_seconds: dict[float, float]

    def __str__(self) -> str:
        """Return one sentence."""
        total = timedelta(seconds=round(self.activation_seconds + self.sae_seconds))
        share = self.activation_seconds / (self.activation_seconds + self.sae_seconds)
        return (
            f"{self.num_saes} SAEs from one stream: about {self.memory / 1e9:.1f} GB of memory, "
            f"and by a trial of {TRIAL} steps {total} of training ({share:.0%} of it the language "
            "model's)."
        )


def forecast(
    suite: GroupSAESuite,
    data: ActivationDataModule,
    device: torch.device,
    world_size: int,
) -> Forecast:
    """Return what the suite's plan will need, after a trial of a few steps that changes nothing.

    Each width is tried: a small SAE takes longer than its share of the FLOPs says.

    Args:
        suite: knows its plan, and makes the SAEs.
        data: the stream.
        device: that trains.
        world_size: processes that share a step.
    """
    plan = suite.plan
    assert plan is not None
    slots, widths = plan.slots, [planned.width for planned in plan.members]
    one_of = {planned.width: planned for planned in reversed(plan.members)}
    trials = {
        width: suite.make_member(planned, slots).to(device) for width, planned in one_of.items()
    }
    optimizers = {width: trial.configure_optimizers() for width, trial in trials.items()}
    rows = data.first_rows(slots, data.blocks_per_step)
    lm, saes = 0.0, dict.fromkeys(trials, 0.0)
    for measured in [False] + [True] * TRIAL:  # the first round warms up
        start = now(device)
        batch = rows()
        between = now(device)
        lm += measured * (between - start)
        # every width in every round: as in training, each finds the cache full of the others
        for width, trial in trials.items():
            step_together([trial], [optimizers[width]], batch)
            start, between = between, now(device)
            saes[width] += measured * (between - start)
    steps = {width: seconds / TRIAL for width, seconds in saes.items()}
    mine = [plan.members[i].width for i in suite.own]
    times = world_size if suite.spread else 1  # its own SAEs get the rows of all processes
    return Forecast(
        num_saes=len(widths),
        memory=bytes_needed(suite, data, mine, 1 if suite.spread else world_size),
        activation_seconds=lm / TRIAL * data.num_steps,
        sae_seconds=sum(steps[width] for width in mine) * times * data.num_steps,
        step_seconds=steps,
    )
