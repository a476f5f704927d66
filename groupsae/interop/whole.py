"""Folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from groupsae.errors import UserError


@contextmanager
def written_whole(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write into; it takes its name when everything was written.

    It is made beside the target. Whatever goes wrong, it is removed, and what the target held
    before stays.

    Args:
        target: the folder to be.
        overwrite: replace a target that is there.

    Raises:
        UserError: the target is there, or cannot be written.
    """
    check_free(target, overwrite=overwrite)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        _swap(beside, target)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}. Name another place with "
            "to=<folder>."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_free(target: Path, *, overwrite: bool) -> None:
    """Raise UserError if the target is there and may not be replaced."""
    if target.exists() and not (overwrite and target.is_dir()):
        raise UserError(
            f"{target} is there already: overwrite=true replaces it, to=<folder> writes elsewhere."
        )


def _swap(beside: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.replace(old)
    try:
        beside.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
