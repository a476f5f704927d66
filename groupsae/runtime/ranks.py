"""The processes of a run, from the environment variables of torchrun, SLURM and Lightning."""

import os
from collections.abc import Mapping
from typing import Any

from groupsae.runtime.errors import UserError


def is_leader() -> bool:
    """Return whether this is the first process, the one that writes and prints."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def takes_several(trainer: Mapping[str, Any]) -> bool:
    """Return whether a trainer can be one of several processes."""
    return trainer["devices"] not in (1, "1") or "strategy" in trainer


def check_processes(trainer: Mapping[str, Any]) -> None:
    """Raise UserError if several processes were started for a trainer that is for one."""
    started_by = {}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started_by["torchrun"] = "WORLD_SIZE"
    if os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):  # a shell is no task
        started_by["srun"] = "SLURM_STEP_NUM_TASKS"
    for command, variable in started_by.items():
        started = int(os.environ.get(variable, "1"))
        if started > 1 and not takes_several(trainer):
            raise UserError(
                f"{command} started {started} processes, but this trainer is for one: use "
                "trainer=ddp or trainer=sae_parallel, or start one process."
            )


def share_cores(processes: int) -> None:
    """Give this process its share of the cores, as Lightning does where it starts processes."""
    import torch  # slow: commands check their arguments first

    if "OMP_NUM_THREADS" not in os.environ:
        here = getattr(os, "sched_getaffinity", None)  # macOS has none
        cores = len(here(0)) if here else os.cpu_count() or 1
        threads = max(1, cores // processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def starts_processes(trainer: Mapping[str, Any]) -> bool:
    """Return whether Lightning would start the other processes itself."""
    outside = {"WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(os.environ)
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    return takes_several(trainer) and not outside and tasks == 1
