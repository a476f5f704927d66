"""The stream of activations that a configuration describes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from groupsae.config.instantiate import make

if TYPE_CHECKING:
    from groupsae.data.activations import ActivationDataModule
    from groupsae.lm.load import FrozenLM

STORE = ("cache", "cache_dtype")  # in `data`, next to the arguments of the text source


def make_source(data: DictConfig) -> Any:
    """Return the source of text that `data` names."""
    return make(OmegaConf.masked_copy(data, [str(key) for key in data if key not in STORE]))


def check_source(data: DictConfig) -> None:
    """Raise UserError if the text that `data` names does not exist; quick, as nothing is read."""
    check = getattr(make_source(data), "check", None)  # a class of the user's own may have none
    if check is not None:
        check()


def make_stream(
    cfg: DictConfig, lm: "FrozenLM", say: Callable[[str], Any]
) -> "ActivationDataModule":
    """Return the activations of a language model on a run's text."""
    from groupsae.data.activations import ActivationDataModule  # slow: the text is checked first

    data = ActivationDataModule(
        lm=lm,
        source=make_source(cfg.data),
        cache=str(Path(cfg.output) / "cache"),
        tokens=cfg.tokens,
        seed=cfg.seed,
        **cfg.stream,
    )
    if cfg.data.get("cache") is not None:
        data.keep_in(cfg.data.cache, cfg.data.cache_dtype, say)
    return data
