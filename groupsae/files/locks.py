"""One process at a time writes into a run folder, or makes what several need."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from rich.console import Console

from groupsae.runtime.errors import UserError

PAUSE = 1.0  # seconds between two tries
LOCK = "lock"  # in the run folder's .hydra; it stays there when the run has ended


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run folder's lock, which the system takes back when this process ends, however.

    Where files cannot be locked, or not even be written, nothing is held.

    Args:
        folder: the run folder; is made if missing.

    Raises:
        UserError: another process holds it; says which, and since when.
    """
    path = folder / ".hydra" / LOCK
    handle = _take(path)
    if handle is None:
        yield
        return
    with handle:
        # Closing gives the lock back. The file stays: who finds none would make another and lock
        # that one, beside a process that has just opened this one.
        yield


@contextmanager
def one_at_a_time(
    path: Path, what: str, wait: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold a lock file while something shared is made; say so and wait while another process does.

    Whoever gets the lock looks first whether what it wanted is there by now. The file goes away
    when what is done inside ends well: who makes a new one finds the result.

    Args:
        path: of the lock file; its folder is made if missing.
        what: the other process does, such as "packing this text".
        wait: is called before each second of waiting.
    """
    said = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    except OSError:  # whatever is written next says it
        yield
        return
    with handle:
        while True:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if not said:
                    sentence = f"another process is {what}: waiting for {path}"
                    Console(stderr=True).print(sentence, highlight=False, soft_wrap=True)
                said = True
                wait()
                time.sleep(PAUSE)
                continue
            except OSError:
                pass  # a file system without locks: one process at a time works there as ever
            break
        yield
        path.unlink(missing_ok=True)


def _take(path: Path) -> IO[str] | None:
    """Return the locked file, or None if there are no locks here."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    except OSError:  # whatever is written next says it
        return None
    try:
        # Not flock: the loader's processes would inherit that lock, and hold it for the seconds
        # by which they outlive a killed run.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        with handle:
            raise UserError(_held(path, handle)) from None
    except OSError:  # a file system without locks
        handle.close()
        return None
    with suppress(OSError):
        handle.truncate(0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": since}, handle)
        handle.flush()
    return handle


def _held(path: Path, handle: IO[str]) -> str:
    """Return who holds the lock, and what can be done."""
    try:
        handle.seek(0)
        by = json.load(handle)
        who = f"process {by['pid']} on {by['host']}, since {by['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"{path.parent.parent} is in use by {who}: two runs would spoil each other's files. Wait "
        "until it ends, or stop it (Ctrl-C or SIGTERM leave a checkpoint) and give the same "
        "command again; output=<folder> runs a second one beside it."
    )
