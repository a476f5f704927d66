"""What is secret: kept out of configurations, which run folders remember, and out of messages."""

import os
import re
from collections.abc import Mapping, Sequence

NAMES = {
    "token", "use_auth_token", "auth_token", "access_token", "hf_token", "refresh_token",
    "session_token", "bearer_token", "api_key", "apikey", "wandb_api_key", "password", "passwd",
    "secret", "client_secret", "secret_key", "access_key", "secret_access_key",
    "aws_secret_access_key", "aws_session_token", "private_key", "credentials", "authorization",
}  # fmt: skip
# of the environment: credentials of the services that our libraries use; others prove nothing
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)  # fmt: skip
_hidden: set[str] = set()  # values of other variables, which a configuration has named
_SHORTEST = 12  # characters of a secret: a shorter text may be there by chance
_PATTERNS = (  # pattern, replacement, name of the secret
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1***@", "an address with a password"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_***", "a token of the Hugging Face Hub"),
    (
        re.compile(
            r"(?i)([?&][\w-]*(?:token|signature|credential|api_?key|secret|password)=)[^&\s'\"]+"
        ),
        r"\1***",
        "an address with a token",
    ),
)
# in messages only: a note in a configuration may begin with "Basic experiments"
_AUTHORIZATION = re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}")


def hide(value: str) -> None:
    """Let `redacted` remove a secret from now on, unless it is too short to be one."""
    if len(value) >= _SHORTEST:
        _hidden.add(value)


def redacted(text: str) -> str:
    """Return a text without secrets: passwords in addresses, tokens, known values.

    Known are the values of `VARIABLES`, and what `hide` was given.

    >>> redacted("cannot reach https://me:pass@hub.org/x?token=abc&b=1")
    'cannot reach https://***@hub.org/x?token=***&b=1'
    """
    for pattern, instead, _ in _PATTERNS:
        text = pattern.sub(instead, text)
    text = _AUTHORIZATION.sub(r"\1***", text)
    for value in (*_secret_variables().values(), *_hidden):
        text = text.replace(value, "***")
    return text


def secret_in(value: object, where: str = "") -> tuple[str, str] | None:
    """Look for a secret at any depth of plain values.

    Args:
        value: mappings, lists and scalars.
        where: its dotted name.

    Returns:
        The dotted name of the first that is found, and what it is, without its value.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            at = f"{where}.{name}" if where else str(name)
            if str(name).lower().replace("-", "_") in NAMES and inner not in (None, False, ""):
                return at, str(name)
            if (found := secret_in(inner, at)) is not None:
                return found
    elif isinstance(value, str):
        for pattern, _, what in _PATTERNS:
            if pattern.search(value):
                return where, what
        for variable, secret in _secret_variables().items():
            if secret in value:
                return where, f"the value of the environment variable {variable}"
    elif isinstance(value, Sequence):
        return next((found for each in value if (found := secret_in(each, where))), None)
    return None


def _secret_variables() -> dict[str, str]:
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    return {name: value for name, value in values.items() if len(value) >= _SHORTEST}
