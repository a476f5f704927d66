"""Write the SAEs of a run as other libraries load them: `python -m groupsae.export run=<folder>`.

With `hub=<owner/name>` they also go to the Hugging Face Hub, in our own format or in another.
"""

from omegaconf import DictConfig

from groupsae.app.run_folder import one_folder
from groupsae.config.arguments import start


def export(cfg: DictConfig) -> None:
    """Export one run."""
    run = one_folder(cfg)
    from groupsae.app.export import export  # slow imports only after the cheap check

    export(cfg, run)


def main() -> None:
    """Start `groupsae-export`, which is `python -m groupsae.export`."""
    start("export", export)


if __name__ == "__main__":
    main()
