"""Train Group-SAEs: `python -m groupsae.train model=pythia-1b groups=amad`."""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from groupsae.config import CONF, check_arguments, plain_folder
from groupsae.errors import UserError
from groupsae.run import alone, forget, open_run, register_resolver


def train(cfg: DictConfig, overrides: list[str]) -> int:
    """Run one configuration; return the exit status."""
    with alone(cfg):
        cfg, folder, checkpoint = open_run(cfg, overrides)
        from groupsae.fit import fit  # slow imports only after the cheap checks

        try:
            return fit(cfg, folder, checkpoint)
        except UserError:
            forget(folder)
            raise


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def run(cfg: DictConfig) -> None:
    """Run one configuration of the command (of a sweep: of each of its points)."""
    try:
        status = train(cfg, list(HydraConfig.get().overrides.task))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


def main() -> None:
    """Start `groupsae-train`, which is `python -m groupsae.train`."""
    register_resolver()
    sys.argv[1:] = [plain_folder(argument) for argument in sys.argv[1:]]
    check_arguments(sys.argv[1:], "train")
    run()


if __name__ == "__main__":
    main()
