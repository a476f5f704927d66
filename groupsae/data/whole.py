"""Files that are there whole or not at all, and a sentence where the disk refuses one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from groupsae.errors import UserError


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
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
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
