"""Errors that come from a network: which may pass, and how long to wait."""

import errno
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from groupsae.runtime.secrets import redacted

LIBRARIES = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
WORTH_RETRYING = {408, 425, 429}  # of the 4xx answers; the others say that asking again is useless
LASTING = {  # of this machine: no pause mends them
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE,
    errno.ENAMETOOLONG,
}  # fmt: skip
LONGEST_PAUSE = 60.0  # seconds
LONGEST_WISH = 3600.0  # seconds that a server may ask for by Retry-After


def is_transient(error: BaseException) -> bool:
    """Return whether an error comes from the network and may be gone at the next try."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    status = _status(error)
    if isinstance(status, int) and 400 <= status < 500:
        return status in WORTH_RETRYING
    if isinstance(error, OSError) and error.errno in LASTING:
        return False
    lasting = FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    return not isinstance(error, lasting) and (
        isinstance(error, OSError | TimeoutError) or _of_network(error)
    )


def lost_connection(error: BaseException) -> BaseException | None:
    """Return what of the errors behind an error came from the network and may pass, if any did."""
    for each in chain(error):
        if (_of_network(each) or isinstance(_status(each), int)) and is_transient(each):
            return each
    return None


def pause_after(error: BaseException, failures: int) -> float:
    """Return the seconds to wait before the next try.

    They are 1, 2, 4, ... and at most a minute, or what the server asked for by Retry-After (in
    seconds or as a date), but no more than an hour.

    Args:
        error: of the last try.
        failures: how many tries in a row have failed.
    """
    own = min(LONGEST_PAUSE, 2.0 ** (failures - 1))
    for each in chain(error):
        headers = getattr(getattr(each, "response", None), "headers", None)
        headers = getattr(each, "headers", None) if headers is None else headers
        wish = None if headers is None else _seconds(str(headers.get("Retry-After", "")))
        if wish is not None:
            return max(own, min(LONGEST_WISH, wish))
    return own


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says, without secrets."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {redacted(lines[0])}" if lines else type(error).__name__


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from, or while handling them."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _status(error: BaseException) -> object:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return getattr(error, "status", None) if status is None else status  # aiohttp's name


def _of_network(error: BaseException) -> bool:
    return bool({kind.__module__.partition(".")[0] for kind in type(error).__mro__} & LIBRARIES)


def _seconds(wish: str) -> float | None:
    if wish.strip().isdigit():
        return float(wish)
    try:
        moment = parsedate_to_datetime(wish)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.fromtimestamp(time.time(), UTC)).total_seconds())
