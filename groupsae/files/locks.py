"""Locks between processes: one writes a run folder, a chunk, or what several need."""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from groupsae.files.atomic import explain_write_errors
from groupsae.runtime.errors import UserError
from groupsae.runtime.output import screen

PAUSE = 1.0  # seconds between two tries


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a run folder's lock, `.hydra/lock`, which the system frees when the process ends.

    Raises:
        UserError: another process holds it (the message names it), or nothing can be written.
    """
    with _open(folder / ".hydra" / "lock") as handle:
        if not _try(handle):
            handle.seek(0)
            raise UserError(
                f"{folder} is in use by {handle.read() or 'another process'}: two runs would "
                "overwrite each other's files. Wait until it ends, or stop it (Ctrl-C or SIGTERM "
                "leave a checkpoint) and give the same command again; output=<folder> starts a "
                "second run elsewhere."
            )
        with suppress(OSError):  # a full disk: the lock works anyway
            handle.truncate(0)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            handle.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
            handle.flush()
        yield


@contextmanager
def one_at_a_time(
    path: Path, what: str, wait: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold a lock file while something shared is made; wait while another process makes it.

    Code inside must check first whether the result exists by now. The lock file is removed when
    that code succeeds: whoever makes a new one finds the result.

    Args:
        path: path of the lock file; its folder is made if missing.
        what: the other process does, such as "packing this text".
        wait: called before each second of waiting.

    Raises:
        UserError: the lock file cannot be written.
    """
    with _open(path) as handle:
        reported = False
        while not _try(handle):
            if not reported:
                sentence = f"another process is {what}: waiting for {path}"
                screen(stderr=True).print(sentence, highlight=False, soft_wrap=True)
            reported = True
            wait()
            time.sleep(PAUSE)
        yield
        path.unlink(missing_ok=True)


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Try to hold the lock file in a folder, made if missing; yield whether this process does.

    Without locks (see `_try`) several processes may write the same: each must write its own
    temporary file.

    Raises:
        UserError: the folder cannot be written.
    """
    with _open(folder / "lock") as handle:
        yield _try(handle)


def _open(path: Path) -> IO[str]:
    """Open a lock file, which stays: a process that made another would lock that one instead."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+")


def _try(handle: IO[str]) -> bool:
    """Take the lock unless another process has it; True where the file system has no locks.

    `lockf`, not `flock`: child processes would inherit that lock and outlive a killed run.
    """
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True
