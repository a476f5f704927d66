"""What is secret: kept out of configurations, which run folders remember, and out of messages."""

import os
import re
from collections.abc import Mapping, Sequence

NAMES = {
    "token", "use_auth_token", "auth_token", "access_token", "hf_token", "api_key", "apikey",
    "wandb_api_key", "password", "passwd", "secret", "secret_key", "access_key", "credentials",
    "authorization",
}  # fmt: skip
_VARIABLE = re.compile(r"TOKEN|API_?KEY|SECRET|PASSW|CREDENTIAL")
_SHORTEST = 12  # characters of a secret: less is found by chance
_ADDRESS = re.compile(r"(\w+://)[^/\s@]+@")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_IN_MESSAGES = (
    (_ADDRESS, r"\1***@"),
    (_HUB_TOKEN, "hf_***"),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}"), r"\1***"),
    (
        re.compile(
            r"(?i)([?&][\w-]*(?:token|signature|credential|api_?key|secret|password)=)[^&\s'\"]+"
        ),
        r"\1***",
    ),
)


def redacted(text: str) -> str:
    """Return a text without what may be secret in it: addresses, tokens, values of variables.

    >>> redacted("cannot reach https://me:pass@hub.org/x?token=abc&b=1")
    'cannot reach https://***@hub.org/x?token=***&b=1'
    """
    for pattern, instead in _IN_MESSAGES:
        text = pattern.sub(instead, text)
    for value in _secret_variables().values():
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
            if str(name).lower() in NAMES and inner not in (None, False, ""):
                return at, str(name)
            if (found := secret_in(inner, at)) is not None:
                return found
    elif isinstance(value, str):
        if _ADDRESS.search(value):
            return where, "an address with a password"
        if _HUB_TOKEN.search(value):
            return where, "a token of the Hugging Face Hub"
        for variable, secret in _secret_variables().items():
            if secret in value:
                return where, f"the value of the environment variable {variable}"
    elif isinstance(value, Sequence):
        return next((found for each in value if (found := secret_in(each, where))), None)
    return None


def _secret_variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _VARIABLE.search(name) and os.sep not in value
    }
