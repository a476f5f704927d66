"""Files and folders that are complete or absent, and one sentence where the disk refuses them."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from groupsae.runtime.errors import UserError


@contextmanager
def explain_write_errors(path: Path, hint: str = "output=<folder>") -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a sentence.

    `hint` is the option that chooses another place.

    Raises:
        UserError: the code inside ends with an OSError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Fix that or "
            f"write elsewhere ({hint}), then give the same command again; complete files are kept."
        ) from error


@contextmanager
def atomic_write(
    path: Path,
    mode: str = "wb",
    *,
    shared: bool = False,
    hint: str = "output=<folder>",
    **how: Any,
) -> Iterator[IO[Any]]:
    """Open a file that replaces `path` once all of it is on disk.

    A killed process or a full disk leaves the old file.

    Args:
        path: path of the file; its folder is made if missing.
        mode: mode for `open`.
        shared: several processes may write it in parallel (a cache): each has its temporary file.
        hint: the option that chooses another place.
        **how: other arguments of `open`: encoding, newline.

    Raises:
        UserError: it cannot be written; nothing of it is left.
    """
    unique = f".{secrets.token_hex(8)}" if shared else ""
    temporary = path.with_name(f"{path.name}{unique}.tmp")
    with explain_write_errors(path, hint):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if "b" not in mode:
                how = {"encoding": "utf-8", **how}  # whatever the locale
            with temporary.open(mode, **how) as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON: a reader sees the old file or the new one.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_write(path, "w") as handle:
        handle.write(json.dumps(value, indent=1))


@contextmanager
def atomic_folder(
    target: Path, *, overwrite: bool, ours: Callable[[Path], bool], source: Path | None = None
) -> Iterator[Path]:
    """Give a temporary folder that takes the target's name at the end.

    On any error it is removed, as are parent folders made for it, and an old target stays.

    Args:
        target: the folder to make.
        overwrite: replace an existing target.
        ours: returns whether this command may have written an existing folder.
        source: the command's input; never replaced.

    Raises:
        UserError: the target exists and may not be replaced, or cannot be written.
    """
    check_free(target, overwrite=overwrite, ours=ours, source=source)
    target = target.resolve()
    new_parents = [folder for folder in target.parents if not folder.exists()]
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    old = temporary.with_name(f"{temporary.name}.old")
    with explain_write_errors(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            if target.exists():
                target.replace(old)
            temporary.replace(target)
        finally:
            if old.exists() and not target.exists():
                old.replace(target)
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
            with suppress(OSError):  # a parent that holds something stays
                for folder in new_parents:
                    folder.rmdir()


def check_free(
    target: Path, *, overwrite: bool, ours: Callable[[Path], bool], source: Path | None = None
) -> None:
    """Raise UserError if the target of `atomic_folder` exists and may not be replaced.

    Only a folder of the same kind is ever replaced, and never the source, the working folder or
    a folder around them.
    """
    if not target.exists():
        return
    if not overwrite:
        raise UserError(
            f"{target} exists: overwrite=true replaces it, output=<folder> writes elsewhere."
        )
    resolved = target.resolve()
    for kept in (Path.cwd(), *([] if source is None else [source.resolve()])):
        if kept.is_relative_to(resolved):
            raise UserError(
                f"{target} is or contains {kept}, which this does not replace: name another "
                "folder with output=<folder>."
            )
    if not resolved.is_dir() or (any(resolved.iterdir()) and not ours(resolved)):
        raise UserError(
            f"{target} holds files that this command does not write, so overwrite=true does not "
            "replace it: name another folder with output=<folder>."
        )
