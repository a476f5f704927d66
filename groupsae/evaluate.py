"""Evaluate a run on held-out text: `python -m groupsae.evaluate run=<run folder>`."""

import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from groupsae.config import CONF, check_arguments, plain_folder
from groupsae.errors import UserError
from groupsae.run import finished_run, register_resolver


def one_folder(named: Any) -> Path:
    """Return the run folder that `run=` names.

    Raises:
        UserError: it names several.
    """
    folders = [str(each) for each in named] if isinstance(named, ListConfig) else [str(named)]
    if len(folders) != 1:
        each = " and ".join(shlex.quote(f"run={folder}") for folder in dict.fromkeys(folders))
        raise UserError(
            f"run names {len(folders)} folders, but one run is evaluated at a time: give {each}"
            f"{', each in a command of its own' if len(set(folders)) > 1 else ' once'}."
        )
    return Path(folders[0])


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def run(cfg: DictConfig) -> None:
    """Evaluate one run."""
    try:
        if OmegaConf.is_missing(cfg, "run") or cfg.run is None:
            raise UserError(
                "which run? Give run=<folder>, such as run=outputs/tiny/amad-0.2/<...>"
            )
        folder = one_folder(cfg.run)
        trained = finished_run(folder)
        if OmegaConf.select(cfg, "logger") is not None:
            trained.logger = cfg.logger
        from groupsae.assess import assess  # slow imports only after the cheap checks

        assess(folder, trained, cfg.evaluation, cfg.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Start `groupsae-evaluate`, which is `python -m groupsae.evaluate`."""
    register_resolver()
    sys.argv[1:] = [plain_folder(argument) for argument in sys.argv[1:]]
    check_arguments(sys.argv[1:], "evaluate")
    run()


if __name__ == "__main__":
    main()
