"""Evaluate a run on held-out text: `python -m groupsae.evaluate run=<run folder>`."""

import signal
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from groupsae.app.run_folder import finished_run, one_folder, register_resolver
from groupsae.config.arguments import CONF, check_arguments, plain_folder
from groupsae.files.locks import lock_folder
from groupsae.runtime.errors import UserError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def run(cfg: DictConfig) -> None:
    """Evaluate one run."""
    try:
        folder = one_folder(cfg)
        trained = finished_run(folder, trusted=cfg.trust_remote_code)
        if OmegaConf.select(cfg, "logger") is not None:
            trained.logger = cfg.logger
        from groupsae.app.evaluate import assess  # slow imports only after the cheap checks

        with lock_folder(folder):
            assess(folder, trained, cfg.evaluation, cfg.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command begins the evaluation again", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def main() -> None:
    """Start `groupsae-evaluate`, which is `python -m groupsae.evaluate`."""
    register_resolver()
    sys.argv[1:] = [plain_folder(argument) for argument in sys.argv[1:]]
    check_arguments(sys.argv[1:], "evaluate")
    run()


if __name__ == "__main__":
    main()
