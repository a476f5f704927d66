"""Loggers of metrics: a tidy csv in the run folder, and Weights & Biases."""

import csv
import netrc
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from groupsae.files.atomic import atomic_write, explain_write_errors
from groupsae.files.reading import read_metrics
from groupsae.runtime.compat import make_wandb_offline

AFTER_TRAINING = {"eval", "interpret"}  # stages of commands on a finished run
COLUMNS = ("step", "metric", "value")


class MetricsCSV(Logger):
    """`metrics.csv` with one row per value: step, metric, value.

    Long form, so that new metrics need no new header and a resumed run appends; rows that a
    killed run wrote after its last checkpoint are dropped when their steps come again.
    """

    def __init__(self, *, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._started = False

    @property
    def name(self) -> str:
        """Return the logger's name."""
        return "csv"

    @property
    def version(self) -> str:
        """Return nothing: the run folder is the version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Do nothing: the configuration is in `.hydra/`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row for each metric."""
        if not self._started:
            self._start(step or 0, {name.split("/")[0] for name in metrics})
        with explain_write_errors(self.path), self.path.open("a", newline="") as handle:
            csv.writer(handle).writerows(
                (step or 0, name, value) for name, value in metrics.items() if name != "epoch"
            )

    def _start(self, step: int, stages: set[str]) -> None:
        """Write the header, or drop the rows of a killed run from this step on.

        A command on the finished run replaces its own rows, not those of the other commands.
        """
        self._started = True
        others = AFTER_TRAINING - stages if stages <= AFTER_TRAINING else set()
        kept = [
            row
            for row in read_metrics(self.path)
            if row[0] < step or row[1].split("/")[0] in others
        ]
        with atomic_write(self.path, "w", newline="") as handle:
            csv.writer(handle).writerows([COLUMNS, *kept])


def has_wandb_account() -> bool:
    """Return whether W&B can log in without asking: by an API key, or an entry in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


class WandB(WandbLogger):
    """Lightning's W&B logger; it records offline where W&B cannot be reached, so no run is lost.

    It begins to record when it is first used, not when it is made.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return W&B's run, which begins now if it has not."""
        Path(str(self.save_dir)).mkdir(parents=True, exist_ok=True)
        try:
            return super().experiment
        except Exception as error:  # any error that W&B raises
            if os.environ["WANDB_MODE"] != "online":
                raise
            warnings.warn(f"W&B: {error}; this run is recorded offline", stacklevel=2)
            make_wandb_offline(self)
            return super().experiment


def is_offline() -> bool:
    """Return whether W&B records offline; known once it has begun."""
    return os.environ.get("WANDB_MODE") in ("offline", "dryrun")


def make_wandb(*, project: str, folder: str, tags: list[str]) -> WandB:
    """Return a W&B logger: online with an account, offline without one, never a prompt.

    W&B's own variables of the environment win: WANDB_MODE, WANDB_NAME, WANDB_DIR and the rest
    (WANDB_PROJECT is in conf/logger/wandb.yaml). A resumed run keeps its id, which comes from its
    folder.
    """
    os.environ.setdefault("WANDB_MODE", "online" if has_wandb_account() else "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    name = "-".join(Path(folder).parts[-2:])
    return WandB(
        project=project,
        save_dir=os.environ.get("WANDB_DIR", folder),
        name=os.environ.get("WANDB_NAME", name),
        id=os.environ.get("WANDB_RUN_ID", name[-64:]),
        resume="allow",
        tags=list(tags) or None,  # None: WANDB_TAGS
        offline=is_offline(),
    )


def begin_records(
    loggers: Sequence[Logger], config: dict[str, Any], show: Callable[[str], object]
) -> None:
    """Log the complete configuration, and show how to upload W&B's offline records."""
    for logger in loggers:
        logger.log_hyperparams(config)
        if isinstance(logger, WandB) and is_offline():
            runs = f"{quote(str(logger.save_dir))}/wandb/offline-*"
            show(f"W&B records offline. To upload it later: wandb sync {runs}")
