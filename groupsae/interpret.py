"""Look into the latents of a run: `python -m groupsae.interpret run=<run folder>`."""

import os
import signal
import sys
from contextlib import nullcontext

from omegaconf import DictConfig

from groupsae.app.run_folder import named_run, register_resolver
from groupsae.config.arguments import start
from groupsae.files.locks import lock_folder
from groupsae.runtime.signals import Stopped


def interpret(cfg: DictConfig) -> None:
    """Interpret the latents of one run."""
    folder, trained = named_run(cfg)
    from groupsae.app.interpret import interpret  # slow imports only after the cheap checks

    rank = int(os.environ.get("RANK", 0))
    count = int(os.environ.get("WORLD_SIZE", 1))
    with lock_folder(folder) if rank == 0 else nullcontext():  # of torchrun's processes the first
        interpret(
            folder,
            trained,
            cfg.interpretation,
            cfg.device,
            dry_run=cfg.dry_run,
            overwrite=cfg.overwrite,
            rank=rank,
            count=count,
        )


def main() -> None:
    """Start `groupsae-interpret`, which is `python -m groupsae.interpret`."""
    register_resolver()
    try:
        start("interpret", interpret)
    except (Stopped, KeyboardInterrupt) as stopped:
        print("stopped; the same command resumes where it was", file=sys.stderr)
        sys.exit(128 + (stopped.number if isinstance(stopped, Stopped) else signal.SIGINT))


if __name__ == "__main__":
    main()
