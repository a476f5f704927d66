"""Where the yaml files are, and a friendly word when a command names one that is not there."""

import difflib
import sys
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from groupsae.errors import UserError

_INSTALLED = Path(__file__).parent / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parent.parent / "conf"


def check_choices(arguments: list[str]) -> None:
    """Exit with one sentence if an argument names an unknown option of a conf group.

    Only groups of our own are looked at, and only while the command adds no folder of its own
    (`--config-dir`), so that a user's own yaml files pass.
    """
    if any(a.startswith(("--config-dir", "-cd", "hydra.searchpath")) for a in arguments):
        return
    for argument in arguments:
        group, _, value = argument.lstrip("+").partition("=")
        if not value or "(" in value or not (CONF / group).is_dir() or "/" in group:
            continue
        known = sorted(p.stem for p in (CONF / group).glob("*.yaml") if p.stem != "base")
        for choice in value.split(","):
            if choice not in (*known, "null"):
                near = difflib.get_close_matches(choice, known, n=3)
                hint = f" Did you mean {' or '.join(near)}?" if near else ""
                print(
                    f"error: {group}={choice} is unknown.{hint} Valid: {', '.join(known)}.",
                    file=sys.stderr,
                )
                sys.exit(2)


def make(cfg: DictConfig, **kwargs: Any) -> Any:
    """Return the object that a conf node describes, built from plain Python values.

    Raises:
        UserError: of the constructor, without Hydra's wrapping.
    """
    try:
        return instantiate(cfg, _convert_="all", **kwargs)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
