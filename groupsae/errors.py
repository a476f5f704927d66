"""The one exception that reaches the user as a sentence instead of a stack trace."""


class UserError(Exception):
    """Something the user can mend: the message names the value, what is allowed and the way out.

    The entry points print it and exit with status 2; library callers catch it like any exception.
    """
