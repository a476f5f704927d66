"""Make a run of SAEs that others trained.

`python -m groupsae.import_saes saes=<folder> model=<model>`; the run folder is what
`groupsae.evaluate` and `groupsae.report` take.
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from groupsae.app.run_folder import register_resolver
from groupsae.config.arguments import start
from groupsae.config.security import check_own
from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError


def import_saes(cfg: DictConfig) -> None:
    """Import the SAEs of one folder or repository."""
    if OmegaConf.is_missing(cfg, "saes") or cfg.saes is None:
        raise UserError("which SAEs? Give saes=<folder>, or saes=hf:<owner/name>.")
    if cfg.evaluate or cfg.interpret:
        raise UserError(
            "evaluate=true and interpret=true are for training: import first, then give the run "
            "folder that is printed to groupsae.evaluate or groupsae.interpret."
        )
    check_own(cfg)
    from groupsae.app.import_saes import import_saes  # slow imports only after the cheap checks

    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    folder = import_saes(cfg, list(overrides))
    print(f"Language model: {cfg.model.name}\nRun folder: {folder}")
    print(f"Next: {command('evaluate', run=folder)}")


def main() -> None:
    """Start `groupsae-import-saes`, which is `python -m groupsae.import_saes`."""
    register_resolver()
    start("import_saes", import_saes)


if __name__ == "__main__":
    main()
