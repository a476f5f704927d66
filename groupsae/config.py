"""Where the yaml files are, and a friendly word when a command names one that is not there."""

import difflib
import sys
from pathlib import Path

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
        if not value or not (CONF / group).is_dir() or "/" in group:
            continue
        known = sorted(p.stem for p in (CONF / group).glob("*.yaml") if p.stem != "base")
        for choice in value.split(","):
            if choice not in (*known, "null"):
                near = difflib.get_close_matches(choice, known, n=3)
                hint = f" Did you mean {' or '.join(near)}?" if near else ""
                print(f"error: {group}={choice} is unknown.{hint} Valid: {', '.join(known)}.",
                      file=sys.stderr)
                sys.exit(2)
