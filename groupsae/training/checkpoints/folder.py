"""The folder that a checkpoint is: written whole or not at all, and verified when read."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from groupsae.runtime.errors import UserError

FORMAT = 1
KEPT = 2  # checkpoints that stay: where the newest is damaged there is another
MANIFEST = "manifest.json"
_NAME = re.compile(r"step=(\d+)\.ckpt")

Record = dict[str, Any]  # bytes and SHA-256 of one file


class Damaged(Exception):
    """A checkpoint that is not what its manifest says; the message says how."""


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the highest step first, whether whole or not.

    Raises:
        UserError: the folder is there but cannot be read.
    """
    try:
        there = list(folder.iterdir())  # (glob would take what it cannot read for empty)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"cannot read {folder}: {error.strerror or error}. Mend that, and the same command "
            "goes on from the last checkpoint there."
        ) from error
    named = ((_NAME.fullmatch(path.name), path) for path in there)
    found = {int(name[1]): path for name, path in named if name}
    return [found[step] for step in sorted(found, reverse=True)]


def partial_of(path: Path) -> Path:
    """Return where a checkpoint is written before it counts."""
    return path.with_suffix(".partial")


def begin(path: Path) -> Path:
    """Make an empty folder for a new checkpoint beside its place, and return it."""
    for left in path.parent.glob("*.partial"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial = partial_of(path)
    partial.mkdir(parents=True)
    return partial


def seal(path: Path, records: Mapping[str, Record]) -> None:
    """Write the manifest and let the checkpoint count: the folder gets its name in one step.

    Then all but the newest are removed, whoever wrote them: a run that is stopped and goes on
    many times leaves as few as one that is not.

    Args:
        path: of the checkpoint; its files lie in `partial_of(path)`.
        records: name of each file -> what `record` gave.
    """
    partial = partial_of(path)
    manifest = {"format": FORMAT, "files": records, "sha256": _digest(records)}
    with (partial / MANIFEST).open("w") as handle:
        handle.write(json.dumps(manifest, indent=1))
        handle.flush()
        os.fsync(handle.fileno())
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)
    for old in checkpoints(path.parent)[KEPT:]:
        if old != path:
            remove(old)


def record(file: Path) -> Record:
    """Bring a written file to disk; return what the manifest says of it."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def clear(path: Path) -> None:
    """Leave nothing of a checkpoint that could not be written."""
    shutil.rmtree(partial_of(path), ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint, if it is there; it ceases to count in one step."""
    if path.exists():
        path.rename(partial_of(path))
        shutil.rmtree(partial_of(path), ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither read nor in the way; return its name."""
    aside = path.with_suffix(".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    return aside


def manifest_of(path: Path) -> dict[str, Record]:
    """Return file -> record of a checkpoint, after a look at the files' sizes.

    Raises:
        Damaged: it is no checkpoint of this format, or a file is too short or too long.
        OSError: a file is missing or cannot be read.
    """
    if path.is_file():
        raise Damaged("it was written by an earlier version of groupsae")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, Record] = manifest["files"]
        if manifest["format"] != FORMAT:
            raise Damaged(f"it has format {manifest['format']}, not {FORMAT}")
        if manifest["sha256"] != _digest(files):
            raise Damaged(f"the checksum of {MANIFEST} is wrong")
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise Damaged(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    return files


def verify(path: Path, names: Sequence[str], records: Mapping[str, Record]) -> None:
    """Raise Damaged if a file's content is not what was written, OSError if it cannot be read.

    Args:
        path: of the checkpoint.
        names: of the files to look at.
        records: what `manifest_of` gave.
    """
    for name in names:
        if name not in records:
            raise Damaged(f"its manifest has no {name}")
        with (path / name).open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if digest != records[name]["sha256"]:
            raise Damaged(f"the checksum of {name} is wrong")


def _digest(records: Mapping[str, Record]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
