"""Write the report of runs: `python -m groupsae.report run=<folder>[,<folder>...]`."""

from pathlib import Path

from omegaconf import DictConfig

from groupsae.config.arguments import start
from groupsae.config.values import names_of
from groupsae.runtime.errors import UserError


def report(cfg: DictConfig) -> None:
    """Write the page and print its path."""
    if not cfg.run:
        raise UserError("run has no default: give run=<run folder>[,<another>...].")
    from groupsae.reporting.page import write_report  # slow imports only after the cheap check

    folders = [Path(str(folder)) for folder in names_of(cfg.run) or []]
    output = None if cfg.output is None else Path(cfg.output)
    print(f"Report: {write_report(folders, output)}")


def main() -> None:
    """Start `groupsae-report`, which is `python -m groupsae.report`."""
    start("report", report)


if __name__ == "__main__":
    main()
