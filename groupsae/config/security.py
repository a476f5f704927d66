"""The classes that a configuration may name: the user's own or that of a stranger's run folder."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from groupsae.config.instantiate import check_targets
from groupsae.config.values import settle_texts
from groupsae.runtime.commands import argument
from groupsae.runtime.errors import UserError
from groupsae.runtime.secrets import secret_in
from groupsae.runtime.trust import runs_code

# interpolations that ask nothing but the configuration itself: other keys, and our one resolver
_INNER = re.compile(r"\$\{(?:run_folder:|[^${}:]*)\}")


def check_own(cfg: DictConfig) -> None:
    """Settle a configuration that was just composed, and check it before anything is built.

    What it takes from the environment (`${oc.env:...}`) or from Hydra becomes plain here, so that
    a run folder shows what was used and asks nothing of whoever opens it.

    Raises:
        UserError: it names a class that is not allowed, holds a secret, or a number where a path
            or name belongs.
    """
    _settle(cfg)
    settle_texts(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    check_targets(plain)
    secret = secret_in(plain)
    if secret is not None:
        raise UserError(
            f"{secret[0]} holds {secret[1]}, and run folders keep their configuration: leave it "
            "out and set the environment variable HF_TOKEN (the Hugging Face Hub), WANDB_API_KEY "
            "(Weights & Biases) or HTTPS_PROXY (a proxy) instead."
        )


def check_saved(saved: DictConfig, folder: Path, *, key: str, trusted: bool) -> None:
    """Check the configuration of a run folder before anything is built or resolved.

    `key` is `run` or `resume`, which named the folder; `trusted` is whether the command line
    allows the language model's own code.

    Raises:
        UserError: it names a class that is not allowed, asks for anything from outside of it, or
            runs the code of the language model's owner, which only the command line may allow.
    """
    plain: Any = OmegaConf.to_container(saved, resolve=False)
    check_targets(plain)
    foreign = next(filter(asks_outside, _strings(plain)), None)
    if foreign is not None:
        raise UserError(
            f"{key}={folder}: its configuration holds {foreign!r}, which could read what is "
            "secret here. Write the plain value into its .hydra/config.yaml instead."
        )
    model = plain.get("model") or {}
    code = runs_code(model.get("load") or {})
    if code is not None and not trusted:
        option = "+model.load.trust_remote_code" if key == "resume" else "trust_remote_code"
        raise UserError(
            f"{key}={folder}: its model.load.{code} would run code of the language model's owner "
            f"({model.get('name')}) on this machine. If you trust it, allow it: "
            f"{argument(key, folder)} {option}=true"
        )


def asks_outside(text: str) -> bool:
    """Return whether a text holds an interpolation that may read more than the configuration.

    >>> asks_outside("${model.name}-${.a.${.b}}"), asks_outside("${oc.${seed}:HOME}")
    (False, True)
    """
    while (shorter := _INNER.sub("", text)) != text:
        text = shorter
    return "${" in text


def _settle(node: DictConfig | ListConfig) -> None:
    """Replace interpolations that read outside the configuration by their plain values."""
    plain: Any = OmegaConf.to_container(node, resolve=False)
    for key, raw in plain.items() if isinstance(plain, dict) else enumerate(plain):
        if isinstance(raw, str) and asks_outside(raw):
            try:
                value = node[key]
            except OmegaConfBaseException as error:
                raise UserError(f"{key}={raw}: {str(error).splitlines()[0]}.") from error
            node[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        elif isinstance(raw, dict | list):
            _settle(node[key])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings([str(key), inner])
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
