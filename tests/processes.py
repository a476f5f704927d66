"""Several processes of one run, without starting Python anew for each: as torchrun starts them."""

import multiprocessing
import os
import socket
import sys
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
    forks.set_forkserver_preload(["runs", "groupsae.fit"])  # the slow imports, once
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


def _said(arguments: list[str], how: str) -> int:
    import runs

    from groupsae.errors import UserError

    try:
        status, _ = getattr(runs, how)(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(status)


def lose(arguments: list[str], rank: int, seconds: float) -> int:
    """Train until a process is killed after its fifth step, or stalls for so many seconds."""
    import time

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
