"""A sweep: every point is one run, a failed one does not stop the others, and all are told of.

Hydra's launchers (one by one, joblib, submitit) run the points, perhaps in processes on other
machines. What became of each is written into a folder that all of them see.
"""

import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from groupsae.app.sweep_process import run_alone
from groupsae.config.security import check_own
from groupsae.files.atomic import write_json
from groupsae.files.reading import read_json
from groupsae.runtime.errors import UserError
from groupsae.runtime.ranks import is_leader, starts_processes
from groupsae.runtime.retry import one_line
from groupsae.runtime.signals import handled_by

PACKAGES = {  # of a launcher -> its module and our extra that brings it
    "parallel": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "submitit"),
}
_current: "SweepRecorder | None" = None  # the sweep that this process belongs to
_signals = ExitStack()  # its signal handlers, which stay until this process ends


class SweepRecorder(Callback):
    """Keeps what became of a sweep's points; Hydra carries it to wherever they run."""

    def __init__(self) -> None:
        self.folder = Path()
        self.points: list[list[str]] = []
        self.command: list[str] = []
        self.side_by_side = False  # by joblib
        self.elsewhere = False  # jobs of submitit, which go on when this process ends
        self.received: int = signal.SIGINT

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Begin: an empty folder, and signals that leave the points time to stop."""
        global _current
        self.command = sys.argv[1:]
        self.side_by_side = "joblib" in config.hydra.launcher._target_
        self.elsewhere = "submitit" in config.hydra.launcher._target_
        task = list(config.hydra.overrides.task)
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        try:
            check_own(own)
        except UserError as error:  # before Hydra writes anything down
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        name = hashlib.sha256(json.dumps(task).encode()).hexdigest()[:8]
        self.folder = (Path(str(own.output)) / "sweeps" / name).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in (*self.folder.glob("point-*.json"), self._stop):
            old.unlink(missing_ok=True)
        self.points = _points(task)
        _current = self
        _signals.enter_context(handled_by(self._interrupted, requeue=False))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Make itself known to the function that runs a point."""
        global _current
        if config.hydra.mode == RunMode.MULTIRUN:
            _current = self
            if self.side_by_side:
                _signals.enter_context(handled_by(self._end_here, requeue=False))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Write down what became of a point."""
        if config.hydra.mode == RunMode.MULTIRUN and is_leader():
            number = config.hydra.job.num
            found = {**job_return.return_value, "point": list(config.hydra.overrides.task)}
            write_json(self.folder / f"point-{number}.json", found)

    @property
    def _stop(self) -> Path:
        return self.folder / "stop"

    @property
    def stopped(self) -> bool:
        """Return whether no further point is to begin."""
        return self._stop.exists()

    def stop(self) -> None:
        """Let no further point begin."""
        self._stop.touch()

    def _interrupted(self, number: int, _frame: object) -> None:
        """Stop the point that runs here; points of joblib's processes are given time to stop.

        While a point trains here, its own callback has the signals. A second one ends all at once.
        submitit's jobs are only left alone.
        """
        again, self.received = self.stopped, number
        if self.elsewhere:
            raise KeyboardInterrupt
        self.stop()
        if again or not self.side_by_side:
            raise KeyboardInterrupt
        if number == signal.SIGTERM:  # Ctrl-C reaches them by itself
            for child in psutil.Process().children(recursive=True):
                if "LokyProcess" in " ".join(child.cmdline()):
                    child.send_signal(number)

    def _end_here(self, number: int, _frame: object) -> None:
        self.received = number
        raise KeyboardInterrupt

    def table(self) -> tuple[int, Table]:
        """Return the exit status of the sweep and what became of its points."""
        records = [read_json(file) for file in sorted(self.folder.glob("point-*.json"))]
        found = {tuple(each["point"]): each for each in records if each is not None}
        points = self.points or [list(point) for point in found]
        shared = set.intersection(*(set(point) for point in points)) if len(points) > 1 else set()
        table = Table("point", "what became of it")
        table.add_column("run folder, or why", overflow="fold")
        statuses = []
        for point in points:
            lost = {"status": -1, "said": "no end was seen: killed, or still running"}
            each = found.get(tuple(point), lost)
            status = each["status"]
            statuses.append(status)
            word = {0: "done", None: "not run", -1: "not known"}.get(
                status, "stopped" if (status or 0) > 128 else "failed"
            )
            varied = " ".join(o for o in point if o not in shared) or " ".join(point)
            table.add_row(varied, word, each["folder"] if status == 0 else each["said"])
        if any(status in (1, 2) for status in statuses):
            return 1, table
        stopped = [status for status in statuses if (status or 0) > 128]
        return (stopped[0] if stopped else int(any(status != 0 for status in statuses))), table


def finish() -> int:
    """Show what became of the points; return the sweep's exit status, 0 where there was none."""
    if _current is None or not _current.command:
        return 0
    console = Console()
    status, table = _current.table()
    console.print(table)
    if status:
        again = shlex.join(_current.command)
        console.print(
            "The same command fills the gaps; what is done is not repeated:\n"
            f"  python -m groupsae.train {again}",
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
    """Run one point of a sweep; never raise, so that the next one runs whatever happens.

    Returns:
        status: 0, 1 or 2 (failed), 128 + signal (stopped), or None (not begun); said: why;
        folder: of the run.
    """
    sweep, said, folder = _current, "", ""
    if sweep is not None and sweep.stopped:
        return {"status": None, "said": "the sweep was stopped before", "folder": ""}
    status = 1
    try:
        check_own(cfg)
        from groupsae.app.run_folder import run_folder

        folder = str(run_folder(cfg))
        if starts_processes(cfg.trainer):
            status = run_alone(overrides)
            said = f"exit status {status}: see above" if status else ""
        else:
            status = train(cfg, overrides)
    except UserError as error:
        status, said = 2, str(error)
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + received()
    except Exception as error:
        traceback.print_exc()
        said = one_line(error)
    if status == 128 + signal.SIGUSR2 and callable(signal.getsignal(signal.SIGUSR2)):
        signal.raise_signal(signal.SIGUSR2)  # to submitit, which lets the point come again
    if status > 128:
        said = f"go on with resume={folder}"
        if sweep is not None and "SUBMITIT_EXECUTOR" not in os.environ:
            sweep.stop()
    return {"status": status, "said": said, "folder": folder}


def check_launcher(arguments: list[str]) -> None:
    """Refuse a launcher that cannot work.

    Args:
        arguments: of the command line.

    Raises:
        UserError: its package is missing, there is no sweep to launch, or every process of
            torchrun would run the whole sweep.
    """
    sweep = bool({"-m", "--multirun"} & set(arguments))
    for argument in arguments:
        key, _, name = argument.partition("=")
        if key != "hydra/launcher":
            continue
        module, extra = PACKAGES.get(name, ("hydra", ""))
        try:
            missing = find_spec(module) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            raise UserError(
                f"{argument} needs a package that is not installed: pip install "
                f"'groupsae[{extra}]'"
            )
        if name in ("slurm", "submitit_slurm") and shutil.which("sbatch") is None:
            raise UserError(
                f"{argument} gives the points to SLURM, which is not on this machine (there is no "
                "sbatch): start it where jobs are submitted, or take hydra/launcher=parallel."
            )
        if not sweep:
            raise UserError(f"{argument} spreads the points of a sweep: add -m, or leave it out.")
    if sweep and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "a sweep (-m) under torchrun would run whole in every process. Leave torchrun out: "
            "each point starts its own processes with trainer=ddp, or is a job of its own with "
            "hydra/launcher=slurm; or give one torchrun command per point."
        )


def _points(task: list[str]) -> list[list[str]]:
    """Return the overrides of every point, in the order in which they run."""
    axes: dict[str, list[str]] = {}  # as Hydra does: of a key that is given twice the last counts
    try:
        for each in OverridesParser.create().parse_overrides(task):
            key = each.get_key_element()
            if each.is_sweep_override():
                axes[key] = [f"{key}={value}" for value in each.sweep_string_iterator()]
            else:
                axes[key] = [f"{key}={each.get_value_element_as_str()}"]
    except (HydraException, ValueError):
        return []  # glob() needs Hydra to be looked up: then only those that ran are told of
    return [list(point) for point in itertools.product(*axes.values())]
