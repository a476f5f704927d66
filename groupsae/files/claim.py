"""Of several processes that want to write the same chunk, one does."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from groupsae.files.atomic import explained


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Tell whether the folder, made if missing, is this process's to write; it is until the end.

    The system takes a claim back when a process ends, however. Where files cannot be locked every
    process has every claim: then some write the same twice, each into a file of its own first.
    The lock file stays: who finds none would make another and lock that one, beside a process
    that has just opened this one.

    Raises:
        UserError: the folder cannot be written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    with handle:
        try:
            # not flock: children would inherit that lock, and hold it longer than this process
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
