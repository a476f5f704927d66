"""A point of a sweep whose processes Lightning starts is a command of its own.

Lightning starts the others by giving the command again: it must be that of one point.
"""

import signal
import subprocess
import sys

from hydra.core.hydra_config import HydraConfig

from groupsae.runtime.signals import handled_by

OF_THE_SWEEP = ("hydra.mode", "hydra.sweep", "hydra.launcher")  # which it is, what runs its points


def run_alone(overrides: list[str]) -> int:
    """Run a point as a command of its own; return its exit status.

    Signals to this process are passed on, and the command is waited for: nothing trains on that
    nobody knows of.
    """
    line = [sys.executable, "-m", "groupsae.train", *_of_the_command(), *overrides]
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def known(number: int) -> int:
        """Return the signal for the command; Ctrl-C may reach it twice, which it ignores."""
        return signal.SIGINT if number == signal.SIGINT else signal.SIGTERM

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(known(number))

    with handled_by(pass_on):
        child = subprocess.Popen(line)
        try:
            if received:  # while it was started
                child.send_signal(known(received[0]))
            status = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    status = status if status >= 0 else 128 - status
    # submitit's signal, which the command does not know, asks for the job to be queued again
    requeue = status == 128 + signal.SIGTERM and signal.SIGUSR2 in received
    return 128 + signal.SIGUSR2 if requeue else status


def _of_the_command() -> list[str]:
    """Return what else of the command a point needs: folders of yaml files, Hydra's options."""
    hydra = HydraConfig.get()
    folders = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    options = [
        option
        for option in hydra.overrides.hydra
        if not option.lstrip("+~").replace("/", ".").startswith(OF_THE_SWEEP)
    ]
    return [*(f"--config-dir={folder}" for folder in folders), *options]
