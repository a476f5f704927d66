"""The one exception that reaches the user as a sentence instead of a stack trace."""

from groupsae.runtime.secrets import redacted


class UserError(Exception):
    """Something the user can mend: the message names the value, what is allowed and the way out.

    The entry points print it and exit with status 2; library callers catch it like any exception.
    What a library said and is secret (an address with a password, a token) is left out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))
