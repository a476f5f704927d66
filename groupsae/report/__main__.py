"""Write the report of runs: `python -m groupsae.report run=<folder>[,<folder>...]`."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from groupsae.config import CONF
from groupsae.errors import UserError


def report(cfg: DictConfig) -> Path:
    """Write the page and return its path."""
    if cfg.run is None:
        raise UserError("run has no default: give run=<run folder>[,<another>...].")
    from groupsae.report.page import write_report  # slow imports only after the cheap checks

    named = [cfg.run] if isinstance(cfg.run, str) else list(cfg.run)
    output = None if cfg.output is None else Path(cfg.output)
    return write_report([Path(str(folder)) for folder in named], output)


def as_list(argument: str) -> str:
    """Return `run=[a,b]` for `run=a,b`, which Hydra would take for a sweep.

    Folders are quoted, so that any character may be in their names.

    >>> as_list("run=outputs/a,outputs/b")
    "run=['outputs/a','outputs/b']"
    """
    key, _, value = argument.partition("=")
    if key != "run" or not value or value[0] in "['\"":
        return argument
    folders = [_quoted(folder) for folder in value.split(",") if folder]
    return f"run=[{','.join(folders)}]"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


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
    sys.argv[1:] = [as_list(argument) for argument in sys.argv[1:]]
    run()


if __name__ == "__main__":
    main()
