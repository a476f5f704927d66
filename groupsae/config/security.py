"""What a configuration may ask for: one's own, and that of a run folder which a stranger made."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from groupsae.config.arguments import INSTEAD
from groupsae.config.instantiate import check_targets
from groupsae.runtime.compat import raw_child
from groupsae.runtime.errors import UserError
from groupsae.runtime.secrets import secret_in

OURS = "run_folder"  # the only resolver that stays in what is saved


def check_own(cfg: DictConfig) -> None:
    """Settle a configuration that was just composed, and look at it before anything is built.

    What it takes from the environment (`${oc.env:...}`) or from Hydra becomes plain here, so that
    a run folder says what was used and asks nothing of whoever opens it.

    Raises:
        UserError: it names a class that is not allowed, or holds a secret.
    """
    _settle(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    check_targets(plain)
    secret = secret_in(plain)
    if secret is not None:
        raise UserError(
            f"{secret[0]} holds {secret[1]}, and run folders keep their configuration: {INSTEAD}"
        )


def check_saved(saved: DictConfig, folder: Path, *, key: str, trusted: bool) -> None:
    """Look at the configuration of a run folder before anything is built or resolved.

    Args:
        saved: the configuration.
        folder: of the run.
        key: `run` or `resume`, which named the folder.
        trusted: whether the command line allows the language model's own code.

    Raises:
        UserError: it names a class that is not allowed, asks for anything from outside of it, or
            runs the code of the language model's owner, which only the command line may allow.
    """
    plain: Any = OmegaConf.to_container(saved, resolve=False)
    check_targets(plain)
    foreign = next((name for name in _resolvers(plain) if name != OURS), None)
    if foreign is not None:
        raise UserError(
            f"{key}={folder}: its configuration asks for ${{{foreign}:...}}, which could read "
            "what is secret here. Write the plain value into its .hydra/config.yaml instead."
        )
    code = _runs_code((plain.get("model") or {}).get("load") or {})
    if code is not None and not trusted:
        allow = "trust_remote_code=true"
        again = f"{quote(f'{key}={folder}')} {allow}"
        if key == "resume":
            again = f"{quote(f'{key}={folder}')} +model.load.{allow}"
        raise UserError(
            f"{key}={folder}: its model.load.{code} would run code of the language model's owner "
            f"({(plain.get('model') or {}).get('name')}) on this machine. If you trust it, say "
            f"so: {again}"
        )


def _runs_code(load: Mapping[str, Any]) -> str | None:
    """Return the option that lets code of the model's owner run here, if there is one."""
    if load.get("trust_remote_code"):
        return "trust_remote_code"
    kernels = [
        name for name in load if name.endswith("_implementation") and "/" in str(load[name])
    ]
    if load.get("use_kernels"):
        kernels.append("use_kernels")
    return kernels[0] if kernels else None  # a kernel that is fetched from the Hub


def _settle(node: DictConfig | ListConfig) -> None:
    """Write plain values in the place of what asks a resolver other than ours."""
    keys: Any = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        child, raw = raw_child(node, key)
        if isinstance(raw, str):
            if any(name != OURS for name in _resolvers(raw)):
                try:
                    value = node[key]
                except OmegaConfBaseException as error:
                    raise UserError(f"{key}={raw}: {str(error).splitlines()[0]}.") from error
                node[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        elif isinstance(child, DictConfig | ListConfig) and raw is not None:
            _settle(child)


def _resolvers(value: Any) -> list[str]:
    if isinstance(value, str):
        return list(_called(value))
    if isinstance(value, dict):
        return [name for key, each in value.items() for name in _resolvers([str(key), each])]
    if isinstance(value, list):
        return [name for each in value for name in _resolvers(each)]
    return []


def _called(text: str) -> Iterator[str]:
    """Yield the name of each resolver: what stands between a `${` and its own `:`.

    OmegaConf lets a name be worked out, as in `${oc.${x}:HOME}`; it is yielded as it stands, and
    is then none of ours.
    """
    for begin in re.finditer(r"\$\{", text):
        depth = 0  # of what else begins within the name
        for place in range(begin.end(), len(text)):
            char = text[place]
            if depth == 0 and char in ":}":
                if char == ":":
                    yield text[begin.end() : place].strip()
                break
            depth += (char == "{") - (char == "}")
