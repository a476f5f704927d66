"""Write the report of runs: `python -m groupsae.report run=<folder>[,<folder>...]`."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from groupsae.config.arguments import CONF, check_arguments, plain_folder
from groupsae.runtime.errors import UserError


def report(cfg: DictConfig) -> Path:
    """Write the page and return its path."""
    if not cfg.run:
        raise UserError("run has no default: give run=<run folder>[,<another>...].")
    from groupsae.reporting.page import write_report  # slow imports only after the cheap checks

    named = [cfg.run] if isinstance(cfg.run, str) else list(cfg.run)
    output = None if cfg.output is None else Path(cfg.output)
    return write_report([Path(str(folder)) for folder in named], output)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def run(cfg: DictConfig) -> None:
    """Run one configuration of the command."""
    try:
        print(f"Report: {report(cfg)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Start `python -m groupsae.report`."""
    sys.argv[1:] = [plain_folder(argument) for argument in sys.argv[1:]]
    check_arguments(sys.argv[1:], "report")
    run()


if __name__ == "__main__":
    main()
