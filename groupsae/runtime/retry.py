"""Network errors: which are temporary, and how long to wait before the next try."""

import errno
import socket
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
)

from groupsae.runtime.secrets import redacted

_LIBRARIES = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
_RETRIED = {408, 425, 429}  # of the 4xx answers; the others mean that another try is useless
_PERMANENT = {  # errors of this machine, which no pause removes
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE,
    errno.ENAMETOOLONG,
}  # fmt: skip
LONGEST_WISH = 3600.0  # seconds that a server may ask for by Retry-After


def retrying(
    retries: int,
    may_pass: Callable[[BaseException], bool],
    report: Callable[[RetryCallState], None],
    sleep: Callable[[float], None] = lambda seconds: time.sleep(seconds),  # tests replace it
) -> Retrying:
    """Return tenacity's loop over tries.

    It waits 1, 2, 4, ... and at most 60 seconds, or as the server's Retry-After asks, but no
    more than an hour. The last error is raised unchanged.
    """
    return Retrying(
        stop=stop_after_attempt(retries + 1),
        wait=_pause,
        retry=retry_if_exception(lambda e: isinstance(e, Exception) and may_pass(e)),
        before_sleep=report,
        sleep=sleep,
        reraise=True,
    )


def is_transient(error: BaseException) -> bool:
    """Return whether an error comes from the network and another try may succeed."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in _RETRIED
    permanent = FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    if isinstance(error, permanent) or getattr(error, "errno", None) in _PERMANENT:
        return False
    return isinstance(error, OSError) or is_network_error(error)


def is_network_error(error: BaseException) -> bool:
    """Return whether a library that carries HTTP requests raised the error."""
    return any(kind.__module__.split(".")[0] in _LIBRARIES for kind in type(error).__mro__)


def hub_is_unknown() -> bool:
    """Return whether the Hub's name cannot be looked up, twice within a second.

    Then there is no network, and the pauses between tries would be waited for in vain. Behind a
    proxy, which looks names up itself, this is never so.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    if address.scheme in proxies or "all" in proxies:
        return False
    for pause in (1.0, 0.0):
        try:
            socket.getaddrinfo(address.hostname, None)
        except socket.gaierror:
            time.sleep(pause)
        else:
            return False
    return True


def network_cause(error: BaseException) -> BaseException | None:
    """Return the transient network error that caused an error, if any."""
    for cause in causes(error):
        if (is_network_error(cause) or _status(cause) is not None) and is_transient(cause):
            return cause
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then the errors that caused it or were being handled."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def one_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message, without secrets."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {redacted(lines[0])}" if lines else type(error).__name__


def _pause(state: RetryCallState) -> float:
    pause = wait_exponential(max=60)(state)
    error = state.outcome and state.outcome.exception()
    for cause in causes(error) if error else ():
        headers = getattr(getattr(cause, "response", cause), "headers", None)
        wish = "" if headers is None else str(headers.get("Retry-After", "")).strip()
        if wish.isdigit():
            return max(pause, min(LONGEST_WISH, float(wish)))
    return pause


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    status = getattr(error, "status", None) if status is None else status  # aiohttp's name
    return status if isinstance(status, int) else None
