"""Starts the processes of this machine, and says so when one of them is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from groupsae.runtime.errors import UserError

POLL = 1.0  # seconds between two looks
END = 10.0  # that the others have to end by themselves after an error here
TOLD = 5.0  # that this process has to stop after another did because of a signal
GRACE = 60.0  # that this process has to notice the loss of another


class WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of one process per device, which watches the others.

    Lightning's own watch ends the first process without a word when another has ended with an
    error. A process that is lost is noticed by the next collective as well, and there the run
    ends in order; this watch is for the case that nothing there notices it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parent = os.getppid()  # now: later it may be gone

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
    ) -> Any:
        """Start the processes that are not there yet, then call the function."""
        try:
            self.cluster_environment.validate_settings(
                num_devices=self.num_processes, num_nodes=self.num_nodes
            )
        except ValueError as error:
            raise UserError(
                f"trainer.devices={self.num_processes} and trainer.num_nodes={self.num_nodes} are "
                f"not what was started: {error}"
            ) from error
        over = threading.Event()
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        if self.procs:
            _beside(self._watch, over)
        elif (
            isinstance(self.cluster_environment, LightningEnvironment)
            and self.cluster_environment.local_rank()
        ):  # its parent is the first process here; any other may leave a run alone
            _beside(_watch_first, self._parent, over)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except BaseException:
            over.set()  # this one has noticed: the others are ended here
            self._end_others()
            raise
        finally:
            over.set()

    def _end_others(self) -> None:
        """Wait for the others, who see the same error; end those that hang."""
        deadline = time.monotonic() + END
        for process in self.procs:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def _watch(self, over: threading.Event) -> None:
        """Wait for a process that ends with an error; give this one some time to notice."""
        while not over.wait(POLL):
            codes = [process.poll() for process in self.procs]
            lost = [(rank, code) for rank, code in enumerate(codes, start=1) if code]
            if lost:
                break
            if all(code == 0 for code in codes):
                return
        else:
            return
        rank, code = lost[0]
        number = -code if code < 0 else code - 128
        told = number in (signal.SIGINT, signal.SIGTERM)  # to stop, as perhaps all of them were
        if over.wait(TOLD if told else GRACE):  # as a rule: this one has noticed, or stops, too
            return
        if told:  # and this one waits for it where signals do not come through
            for process in self.procs:
                process.kill()
            print("stopped; the same command goes on from the last checkpoint", flush=True)
            os._exit(128 + number)
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        print(
            f"error: process {rank} of this run was lost ({how}) and nothing was heard of it "
            "since, so all others are ended. Give the same command again: the run goes on from "
            "its last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        for process in self.procs:
            process.kill()
        os.kill(os.getpid(), signal.SIGKILL)


def _watch_first(number: int, over: threading.Event) -> None:
    """End this process when the first one, which started it, is gone and nothing noticed that."""
    while os.getppid() == number:
        if over.wait(POLL):
            return
    if over.wait(GRACE):
        return
    print(
        "error: the first process of this run was lost, so this one is ended as well. Give the "
        "same command again: the run goes on from its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os.kill(os.getpid(), signal.SIGKILL)


def _beside(watch: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=watch, args=args, daemon=True, name=watch.__name__).start()
