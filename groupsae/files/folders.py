"""Folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from groupsae.runtime.errors import UserError


@contextmanager
def written_whole(
    target: Path, *, overwrite: bool, ours: Callable[[Path], bool], source: Path | None = None
) -> Iterator[Path]:
    """Give a folder to write into; it takes its name when everything was written.

    It is made beside the target. Whatever goes wrong, it is removed, as are the folders above it
    that were made for it, and what the target held before stays.

    Args:
        target: the folder to be.
        overwrite: replace a target that is there.
        ours: whether a folder that is there is one that this replaces.
        source: what is read, which must not be replaced.

    Raises:
        UserError: the target is there and may not be replaced, or cannot be written.
    """
    check_free(target, overwrite=overwrite, ours=ours, source=source)
    target = target.resolve()
    made = [folder for folder in target.parents if not folder.exists()]
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
        with suppress(OSError):  # those that hold something stay
            for folder in made:
                folder.rmdir()


def check_free(
    target: Path, *, overwrite: bool, ours: Callable[[Path], bool], source: Path | None = None
) -> None:
    """Raise UserError if the target is there and may not be replaced.

    Only what an earlier command of the same kind wrote is ever replaced, and never the source,
    the working folder or a folder around them.

    Args:
        target: the folder to be.
        overwrite: replace it.
        ours: whether a folder is what such a command leaves.
        source: what is read.
    """
    if not target.exists():
        return
    if not overwrite:
        raise UserError(
            f"{target} is there already: overwrite=true replaces it, to=<folder> writes elsewhere."
        )
    whole = target.resolve()
    for kept in (Path.cwd(), *([] if source is None else [source.resolve()])):
        if kept.is_relative_to(whole):
            raise UserError(
                f"{target} is or holds {kept}, which is not replaced: name another folder with "
                "to=<folder>."
            )
    if not whole.is_dir() or (any(whole.iterdir()) and not ours(whole)):
        raise UserError(
            f"{target} holds something else than this command writes, so overwrite=true does not "
            "replace it: name another folder with to=<folder>."
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
