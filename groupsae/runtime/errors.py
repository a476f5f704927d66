"""The one exception that reaches the user as a sentence instead of a stack trace."""

from groupsae.runtime.secrets import redacted


class UserError(Exception):
    """An error that the user can fix: it names the value, what is allowed and what to do.

    Commands print it and exit with status 2; library callers catch it like any exception.
    Secrets that a library put into its message (passwords in addresses, tokens) are removed.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))
