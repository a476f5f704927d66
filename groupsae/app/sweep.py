"""A sweep: every point is one run; a failed one does not stop the others, and a table lists all.

Hydra's launchers (one by one, joblib, submitit) run the points, perhaps in processes on other
machines. The result of each is written into a folder that all of them see.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from groupsae.app.run_folder import run_folder
from groupsae.config.arguments import one_sentence
from groupsae.config.security import check_own
from groupsae.files.atomic import write_json
from groupsae.files.reading import read_json
from groupsae.runtime.commands import argument, command
from groupsae.runtime.errors import UserError
from groupsae.runtime.output import screen
from groupsae.runtime.ranks import is_leader, starts_processes
from groupsae.runtime.retry import one_line
from groupsae.runtime.signals import handled_by

OF_THE_SWEEP = ("hydra.mode", "hydra.sweep", "hydra.launcher")  # options that no point gets
_current: "SweepRecorder | None" = None  # the sweep that this process belongs to
_signals = ExitStack()  # its signal handlers, which stay until this process ends


class SweepRecorder(Callback):
    """Records the result of every point; Hydra carries it to wherever the points run."""

    def __init__(self) -> None:
        self.folder = Path()
        self.points: list[list[str]] = []
        self.command: list[str] = []
        self.launcher = ""
        self.received: int = signal.SIGINT

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the configuration, empty the folder, and take the signals over."""
        global _current
        self.command = sys.argv[1:]
        self.launcher = str(config.hydra.launcher._target_)
        task = list(config.hydra.overrides.task)
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        with one_sentence():  # before Hydra writes anything down
            check_own(own)
        name = hashlib.sha256(json.dumps(task).encode()).hexdigest()[:8]
        self.folder = (Path(str(own.output)) / "sweeps" / name).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (*self.folder.glob("point-*.json"), self.stop):
            old.unlink(missing_ok=True)
        self.points = _points(task)
        _current = self
        _signals.enter_context(handled_by(self._interrupted, requeue=False))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Register with `run_point`, in the process that runs it."""
        global _current
        if config.hydra.mode == RunMode.MULTIRUN:
            _current = self
            if "joblib" in self.launcher:
                _signals.enter_context(handled_by(self._end_here, requeue=False))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Write the result of a point."""
        if config.hydra.mode == RunMode.MULTIRUN and is_leader():
            result = {**job_return.return_value, "point": list(config.hydra.overrides.task)}
            write_json(self.folder / f"point-{config.hydra.job.num}.json", result)

    @property
    def stop(self) -> Path:
        """The file that lets no further point begin."""
        return self.folder / "stop"

    def _interrupted(self, number: int, _frame: object) -> None:
        """Stop the point that runs here, or let joblib's processes stop; a second signal ends all.

        (While a point trains here, its own callback has the signals.) Jobs of submitit run
        elsewhere and continue.
        """
        again, self.received = self.stop.exists(), number
        if "submitit" in self.launcher:
            raise KeyboardInterrupt
        self.stop.touch()
        if again or "joblib" not in self.launcher:
            raise KeyboardInterrupt
        if number == signal.SIGTERM:  # Ctrl-C reaches them directly
            for child in psutil.Process().children(recursive=True):
                if "LokyProcess" in " ".join(child.cmdline()):
                    child.send_signal(number)

    def _end_here(self, number: int, _frame: object) -> None:
        self.received = number
        raise KeyboardInterrupt

    def table(self) -> tuple[int, Table]:
        """Return the exit status of the sweep and the results of its points."""
        records = [read_json(file) for file in sorted(self.folder.glob("point-*.json"))]
        results = {tuple(record["point"]): record for record in records if record is not None}
        points = self.points or [list(point) for point in results]
        shared = set.intersection(*(set(point) for point in points)) if len(points) > 1 else set()
        table = Table("point", "result")
        table.add_column("run folder, or why", overflow="fold")
        unknown = {"status": -1, "reason": "its end was not recorded: killed, or still running"}
        statuses = []
        for point in points:
            result = results.get(tuple(point), unknown)
            status = result["status"]
            statuses.append(status)
            words = {0: "done", None: "not run", -1: "unknown"}
            word = words.get(status, "stopped" if (status or 0) > 128 else "failed")
            varied = " ".join(o for o in point if o not in shared) or " ".join(point)
            table.add_row(varied, word, result["folder"] if status == 0 else result["reason"])
        if any(status in (1, 2) for status in statuses):
            return 1, table
        stopped = [status for status in statuses if (status or 0) > 128]
        return (stopped[0] if stopped else int(any(status != 0 for status in statuses))), table


def finish() -> int:
    """Print the results of the points; return the sweep's exit status, 0 where there was none."""
    if _current is None or not _current.command:
        return 0
    console = screen()
    status, table = _current.table()
    console.print(table)
    if status:
        console.print(
            "The same command runs the missing points; finished ones are not repeated:\n"
            f"  {command('train', *_current.command)}",
            soft_wrap=True,
            highlight=False,
        )
    return status


def received() -> int:
    """Return the signal that ended a command or one of its points with KeyboardInterrupt."""
    return signal.SIGINT if _current is None else _current.received


def run_point(
    cfg: DictConfig, overrides: list[str], train: Callable[[DictConfig, list[str]], int]
) -> dict[str, Any]:
    """Run one point of a sweep; never raise, so that the next one always runs.

    Returns:
        status: 0, 1 or 2 (failed), 128 + signal (stopped), or None (not begun); reason: why;
        folder: the run folder.
    """
    sweep, reason, folder = _current, "", ""
    if sweep is not None and sweep.stop.exists():
        return {"status": None, "reason": "the sweep was stopped before", "folder": ""}
    status = 1
    try:
        check_own(cfg)
        folder = str(run_folder(cfg))
        if starts_processes(cfg.trainer):
            status = run_alone(overrides)
            reason = f"exit status {status}: see above" if status else ""
        else:
            status = train(cfg, overrides)
    except UserError as error:
        status, reason = 2, str(error)
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + received()
    except Exception as error:
        traceback.print_exc()
        reason = one_line(error)
    if status == 128 + signal.SIGUSR2 and callable(signal.getsignal(signal.SIGUSR2)):
        signal.raise_signal(signal.SIGUSR2)  # to submitit, which queues the point again
    if status > 128:
        reason = f"resume it with {argument('resume', folder)}"
        if sweep is not None and "SUBMITIT_EXECUTOR" not in os.environ:
            sweep.stop.touch()
    return {"status": status, "reason": reason, "folder": folder}


def run_alone(overrides: list[str]) -> int:
    """Run a point of several processes as a separate command; return its exit status.

    Lightning starts the other processes by giving the command again, which must be that of one
    point. Signals to this process are passed on, and the command is waited for.
    """
    hydra = HydraConfig.get()
    folders = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    options = [
        option
        for option in hydra.overrides.hydra
        if not option.lstrip("+~").replace("/", ".").startswith(OF_THE_SWEEP)
    ]
    more = [*(f"--config-dir={folder}" for folder in folders), *options]
    return run_command([sys.executable, "-m", "groupsae.train", *more, *overrides])


def run_command(line: list[str]) -> int:
    """Run a command, pass signals on to it, and return its exit status."""
    signals: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _frame: object) -> None:
        signals.append(number)  # (Ctrl-C may reach the command twice, which it ignores)
        if child is not None:
            child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    with handled_by(pass_on):
        child = subprocess.Popen(line)
        try:
            if signals:  # while it was started
                pass_on(signals.pop(), None)
            status = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    status = status if status >= 0 else 128 - status
    # submitit's signal, which the command does not know, asks for the job to be queued again
    requeue = status == 128 + signal.SIGTERM and signal.SIGUSR2 in signals
    return 128 + signal.SIGUSR2 if requeue else status


def check_launcher(arguments: list[str]) -> None:
    """Refuse a launcher that cannot work.

    Raises:
        UserError: its package is missing, or every process of torchrun would run all of the
            sweep.
    """
    extras = {"parallel": "joblib", "slurm": "submitit"}  # of our yaml files
    for given in (a for a in arguments if a.startswith("hydra/launcher=")):
        name = given.partition("=")[2]
        extra = extras.get(name, name.partition("_")[0])
        if extra in extras.values() and not _installed(extra):
            raise UserError(
                f"{given} needs a package that is not installed: pip install 'groupsae[{extra}]'"
            )
    if {"-m", "--multirun"} & set(arguments) and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "under torchrun every process would run the complete sweep (-m). Omit torchrun: "
            "each point starts its own processes with trainer=ddp, or is a separate job with "
            "hydra/launcher=slurm; or give one torchrun command per point."
        )


def _installed(extra: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.hydra_{extra}_launcher") is not None
    except ModuleNotFoundError:  # no plugins at all
        return False


def _points(task: list[str]) -> list[list[str]]:
    """Return the overrides of every point, in the order in which they run."""
    try:
        overrides = OverridesParser.create().parse_overrides(task)
        (points,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    except (HydraException, ValueError):
        return []  # glob() needs Hydra to look it up: then the table has only those that ran
    return [list(point) for point in points]
