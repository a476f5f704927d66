"""Train Group-SAEs: `python -m groupsae.train model=pythia-1b groups=amad`."""

import signal
import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from groupsae.app.run_folder import open_run, register_resolver
from groupsae.app.sweep import check_launcher, finish, received, run_point
from groupsae.config.arguments import one_sentence, start


def train(cfg: DictConfig, overrides: list[str]) -> int:
    """Run one configuration; return the exit status."""
    with open_run(cfg, overrides) as run:
        from groupsae.app.fit import fit  # slow imports only after the cheap checks

        return fit(run)


def command(cfg: DictConfig) -> dict[str, Any] | None:
    """Run one configuration of the command (of a sweep: one of its points)."""
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        register_resolver()  # in a launcher's process
        return run_point(cfg, overrides, train)
    status = train(cfg, overrides)
    # only the end of Python is left, which a signal would make look like a failure
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if status:
        sys.exit(status)
    return None


def main() -> None:
    """Start `groupsae-train`, which is `python -m groupsae.train`."""
    register_resolver()
    with one_sentence():
        check_launcher(sys.argv[1:])
    stopped = 0
    try:
        start("train", command)
    except KeyboardInterrupt:  # before training, or while jobs run elsewhere
        stopped = 128 + received()
    except Exception:  # a launcher's error; the points that ran are shown anyway
        finish()
        raise
    status = max(finish(), stopped)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
