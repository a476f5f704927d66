"""The stream of activations that a configuration describes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from groupsae.config.instantiate import make
from groupsae.data.activations import ActivationDataModule
from groupsae.lm.load import FrozenLM

STORE = ("cache", "cache_dtype")  # in `data`, next to the arguments of the text source


def make_source(data: DictConfig) -> Any:
    """Return the source of text that `data` names."""
    return make(OmegaConf.masked_copy(data, [str(key) for key in data if key not in STORE]))


def make_stream(cfg: DictConfig, lm: FrozenLM, say: Callable[[str], Any]) -> ActivationDataModule:
    """Return the activations of a language model on a run's text."""
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
