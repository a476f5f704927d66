"""Private API of other libraries that we rely on; tests/runtime/test_compat.py checks each."""

from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed


def share_cores(num_processes: int) -> None:
    """Give this process its share of a machine's cores, as Lightning's launcher does."""
    _set_num_threads_if_needed(num_processes=num_processes)


def disable_signal_handling(trainer: L.Trainer) -> None:
    """Turn off Lightning's own reaction to signals.

    On SIGTERM it exits without a checkpoint and with status 0, by a collective inside the signal
    handler; with several processes it asks before every step whether a signal came, for which the
    host waits; and under SLURM it saves in the middle of a step, on SIGUSR1.
    """
    private: Any = trainer
    private._signal_connector.register_signal_handlers = lambda: None
    private.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def skip_next_validation(trainer: L.Trainer) -> None:
    """Leave out the validation that Lightning would run when training is told to stop."""
    trainer.fit_loop.epoch_loop._skip_next_val = True


def release_started_processes(launcher: Any) -> list[Any]:
    """Stop watching the processes that Lightning started; return them.

    Lightning's observer kills this process when one that it watches ends with an error. It reads
    the launcher's list of processes, and ends when that is empty.

    Args:
        launcher: of a strategy that starts its processes by giving the command again.
    """
    processes = list(launcher.procs)
    launcher.procs.clear()
    return processes
