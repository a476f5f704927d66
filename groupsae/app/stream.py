"""The stream of activations that a configuration describes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from groupsae.config.instantiate import make
from groupsae.data.activations import ActivationDataModule
from groupsae.lm.load import FrozenLM

STORE = ("cache", "cache_dtype")  # in `data`, next to the arguments of the text source


def make_stream(cfg: DictConfig, lm: FrozenLM, say: Callable[[str], Any]) -> ActivationDataModule:
    """Return the activations of a language model on a run's text."""
    source = OmegaConf.masked_copy(cfg.data, [str(k) for k in cfg.data if k not in STORE])
    data = ActivationDataModule(
        lm=lm,
        source=make(source),
        cache=str(Path(cfg.output) / "cache"),
        tokens=cfg.tokens,
        seed=cfg.seed,
        **cfg.stream,
    )
    if cfg.data.get("cache") is not None:
        data.keep_in(cfg.data.cache, cfg.data.cache_dtype, say)
    return data
