"""Train Group-SAEs: `python -m groupsae.train model=pythia-1b groups=amad`."""

import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from groupsae.app.run_folder import alone, forget, open_run, register_resolver
from groupsae.app.sweep import check_launcher, finish, received, run_point
from groupsae.config.arguments import CONF, check_arguments, plain_folder
from groupsae.runtime.errors import UserError


def train(cfg: DictConfig, overrides: list[str]) -> int:
    """Run one configuration; return the exit status."""
    with alone(cfg):
        cfg, folder, checkpoint = open_run(cfg, overrides)
        from groupsae.app.fit import fit  # slow imports only after the cheap checks

        try:
            return fit(cfg, folder, checkpoint)
        except UserError:
            if not cfg.dry_run:  # which may look at a folder that another run is in
                forget(folder)
            raise


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Run one configuration of the command (of a sweep: of each of its points)."""
    overrides = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        register_resolver()  # in a launcher's process
        return run_point(cfg, overrides, train)
    try:
        status = train(cfg, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)
    return None


def main() -> None:
    """Start `groupsae-train`, which is `python -m groupsae.train`."""
    register_resolver()
    sys.argv[1:] = [plain_folder(argument) for argument in sys.argv[1:]]
    check_arguments(sys.argv[1:], "train")
    try:
        check_launcher(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    stopped = 0
    try:
        run()
    except KeyboardInterrupt:  # before training, or while jobs run elsewhere
        stopped = 128 + received()
    finally:
        status = max(finish(), stopped)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
