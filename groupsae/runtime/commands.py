"""Commands to paste into a shell: what they name stays as it is, whatever characters it has."""

import re
import shlex

# what Hydra, or our reading of `run=`, would not take for the text itself
_NOT_PLAIN = re.compile(r"""^[\['"~\s]|[,\\]|\$\{|\s$|^(null|\?\?\?|)$""", re.IGNORECASE)


def command(name: str, *more: str, **values: object) -> str:
    r"""Return a command of this package, quoted for the shell and for Hydra.

    Args:
        name: such as `evaluate`.
        *more: complete arguments, as the command got them.
        **values: paths and names by their keys.

    >>> print(command("evaluate", run="outputs/stop me (1)"))
    python -m groupsae.evaluate 'run=outputs/stop me (1)'
    >>> print(command("report", run="a=b,c"))
    python -m groupsae.report 'run="a=b,c"'
    """
    given = [*map(shlex.quote, more), *(argument(key, value) for key, value in values.items())]
    return " ".join([f"python -m groupsae.{name}", *given])


def argument(key: str, value: object) -> str:
    """Return `key=value` of a path or name, quoted for the shell and for Hydra.

    >>> argument("resume", "outputs/tiny"), argument("resume", "outputs/a b")
    ('resume=outputs/tiny', "'resume=outputs/a b'")
    """
    text = str(value)
    if _NOT_PLAIN.search(text):
        text = hydra_text(text.replace("${", "\\${"))
    return shlex.quote(f"{key}={text}")


def hydra_text(text: str) -> str:
    r"""Return a text as Hydra reads it, in quotes: no number, list or sweep.

    >>> print(hydra_text("a,b"), hydra_text('say "hi"'), hydra_text("\\"))
    "a,b" "say \"hi\"" "\\"
    """
    # Hydra's grammar takes a backslash for itself, except in front of a quote
    return '"' + re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ("\\" + m[2]) * bool(m[2]), text) + '"'
