"""Evaluate a run on held-out text: `python -m groupsae.evaluate run=<run folder>`."""

import signal
import sys

from omegaconf import DictConfig

from groupsae.app.run_folder import named_run, register_resolver
from groupsae.app.stream import check_source
from groupsae.config.arguments import start
from groupsae.files.locks import lock_folder


def evaluate(cfg: DictConfig) -> None:
    """Evaluate one run."""
    folder, trained = named_run(cfg)
    check_source(trained.data)
    from groupsae.app.evaluate import evaluate  # slow imports only after the cheap checks

    with lock_folder(folder):
        evaluate(folder, trained, cfg.evaluation, cfg.device)


def main() -> None:
    """Start `groupsae-evaluate`, which is `python -m groupsae.evaluate`."""
    register_resolver()
    try:
        start("evaluate", evaluate)
    except KeyboardInterrupt:
        print("stopped; the same command begins the evaluation again", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
