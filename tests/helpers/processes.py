"""Several processes of one run, without a new Python for each: as torchrun starts them."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 300  # seconds


class Ended(NamedTuple):
    """How a process ended: exit status (or minus the signal), and what it wrote."""

    status: int
    output: str


def together(
    job: Callable[..., int], processes: int, log: Path, *arguments: object
) -> list[Ended]:
    """Call a function of an importable module in every process; return how each ended.

    Args:
        job: returns the exit status.
        processes: how many.
        log: a folder for what they write.
        *arguments: of the job.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(
        ["tests.helpers.runs", "groupsae.app.fit"]
    )  # the slow imports, once
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.mkdir(parents=True, exist_ok=True)
    started = [
        forks.Process(target=_begin, args=(job, rank, processes, port, log, arguments))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT)
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()
    return [
        Ended(process.exitcode, (log / f"{rank}.txt").read_text())
        for rank, process in enumerate(started)
    ]


def _begin(
    job: Callable[..., int],
    rank: int,
    processes: int,
    port: int,
    log: Path,
    arguments: tuple[object, ...],
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test", OMP_NUM_THREADS="1",
    )  # fmt: skip
    handle = os.open(log / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False, buffering=1)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
    import torch

    torch.set_num_threads(1)
    status = 1
    try:
        status = job(*arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # what another process that is gone left behind must not hold this one up


def train(arguments: list[str]) -> int:
    """Train as the command line would."""
    return _said(arguments, "run")


def stop(arguments: list[str]) -> int:
    """Train until SIGTERM comes in the third step."""
    return _said(arguments, "stopped")


def stop_second(arguments: list[str], step: int) -> int:
    """Train until SIGTERM comes to the second process in some step."""

    def tell() -> None:
        if os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)

    return _said(arguments, "stopped", step, tell)


def stop_group(arguments: list[str], number: int, measuring: bool) -> int:
    """Train until a signal comes to all processes of this one's group, workers of loaders too."""
    from groupsae.grouping.angles import AngularDistance

    os.setpgrp()

    def tell(*_: object) -> None:
        kill = ["kill", f"-{number}", "--", f"-{os.getpgid(0)}"]
        subprocess.run(kill, check=True, start_new_session=True)  # from outside
        time.sleep(1)  # in which a worker that ended would be noticed

    if measuring:
        AngularDistance.update = tell
        return train(arguments)
    return _said(arguments, "stopped", 3, tell)


def _said(arguments: list[str], how: str, *more: object) -> int:
    from groupsae.runtime.errors import UserError
    from tests.helpers import runs

    try:
        status, _ = getattr(runs, how)(arguments, *more)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return int(status)


def lose(arguments: list[str], rank: int, seconds: float) -> int:
    """Train until a process is killed after its fifth step, or stalls for so many seconds."""
    from groupsae.training.callbacks.throughput import Throughput

    inherited = Throughput.on_train_batch_end

    def then(self: Throughput, trainer: object, *args: object) -> None:
        inherited(self, trainer, *args)
        if trainer.global_step == 5 and trainer.global_rank == rank:
            if not seconds:
                os.kill(os.getpid(), 9)
            time.sleep(seconds)

    Throughput.on_train_batch_end = then
    return train(arguments)
