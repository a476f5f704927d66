"""Pretrain the bundled language model: `python -m groupsae.pretrain`."""

from omegaconf import DictConfig

from groupsae.config.arguments import start


def pretrain(cfg: DictConfig) -> None:
    """Pretrain one language model."""
    from groupsae.app.pretrain import pretrain

    pretrain(cfg)


def main() -> None:
    """Start `python -m groupsae.pretrain`."""
    start("pretrain", pretrain)


if __name__ == "__main__":
    main()
