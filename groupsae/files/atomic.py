"""Files that are there whole or not at all, and a sentence where the disk refuses one."""

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from groupsae.runtime.errors import UserError

_OWN = re.compile(r".+@(?P<host>[^@]*)@(?P<process>\d{1,9})@[^@]+\.tmp")
UNTOUCHED = 900.0  # seconds after which a file of another machine's process counts as left behind


@contextmanager
def whole(path: Path, *, shared: bool = False, **how: Any) -> Iterator[IO[Any]]:
    """Give a file to write into, which takes the place of `path` when all of it is on disk.

    A process that is killed, or a disk that is full, leaves what was there before.

    Args:
        path: of the file to be; its folder is made if missing.
        shared: several processes may write it at once (a cache); each then has a file of its own
            until the end.
        **how: to open it: mode (bytes if none is given), encoding, newline.

    Raises:
        UserError: it cannot be written; nothing of it is left.
    """
    beside = own_beside(path) if shared else path.with_name(f"{path.name}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open(**({"mode": "wb"} | how)) as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            beside.replace(path)
        except BaseException:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def own_beside(path: Path) -> Path:
    """Return a name beside a file that no other process, on this machine or another, writes to."""
    own = f"{socket.gethostname()}@{os.getpid()}@{secrets.token_hex(4)}"
    return path.with_name(f"{path.name}@{own}.tmp")


def left_behind(beside: Path) -> bool:
    """Return whether what has a name of `own_beside` is of no use to anybody any more.

    Its process has ended, or runs on another machine and has not touched it for a long time. What
    has another name is somebody else's.
    """
    named = _OWN.fullmatch(beside.name)
    if not named:
        return False
    if named["host"] == socket.gethostname():
        return not psutil.pid_exists(int(named["process"]))
    try:
        return time.time() - beside.stat().st_mtime > UNTOUCHED
    except OSError:  # gone meanwhile
        return False


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write a file into a sentence.

    Raises:
        UserError: what is done inside ends with an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. What was written before is whole: "
            "make room there, and the same command goes on."
        ) from error
