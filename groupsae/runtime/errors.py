"""The one exception that reaches the user as a sentence instead of a stack trace."""

from collections.abc import Iterable

from groupsae.runtime.secrets import redacted


class UserError(Exception):
    """An error that the user can fix: it names the value, the allowed values and the solution.

    Commands print it and exit with status 2; library callers catch it like any exception.
    Secrets that a library put into its message (passwords in addresses, tokens) are removed.

    >>> check_choice("rule", "compleet", ("complete", "even"))
    Traceback (most recent call last):
        ...
    groupsae.runtime.errors.UserError: rule is 'compleet': use complete, even.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


def check_choice(key: str, value: object, allowed: Iterable[str]) -> None:
    """Raise UserError unless the value of a key is one of the allowed words."""
    words = tuple(allowed)
    if value not in words:
        raise UserError(f"{key} is {value!r}: use {', '.join(words)}.")
