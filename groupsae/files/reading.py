"""Reads the files of a run folder: JSON, YAML, csv, npz."""

import csv
import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped,unused-ignore]

from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError
from groupsae.runtime.retry import one_line


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file.

    Raises:
        UserError: it is damaged.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if the file does not exist.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(values, dict):
        raise damaged(path, f"it holds a {type(values).__name__}, not an object")
    return values


def require_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    values = read_json(path)
    if values is None:
        raise missing(path)
    return values


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; None if the file does not exist.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise damaged(path) from error


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """Return the (step, metric, value) rows of a `metrics.csv`; empty if it does not exist.

    A last line without an end is left out: a kill or a full disk truncated it.
    """
    rows: list[tuple[int, str, float]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as handle:
            lines = [line for line in handle if line.endswith("\n")]
        for row in list(csv.reader(lines))[1:]:
            with suppress(ValueError):  # a truncated line that later rows continued
                step, name, value = row
                rows.append((int(step), name, float(value)))
    return rows


def missing(path: Path) -> UserError:
    """Return the error about a file that is not there."""
    return UserError(f"{path} is missing: {_remedy(path)}.")


def damaged(path: Path, reason: object = "") -> UserError:
    """Return the error about a damaged file or folder, with the reason."""
    text = one_line(reason) if isinstance(reason, Exception) else reason
    detail = f" ({text})" if text else ""
    return UserError(f"{path} is damaged{detail}: {_remedy(path)}.")


def _remedy(path: Path) -> str:
    """Return which command writes a file again, if it belongs to a run folder."""
    run = next((folder for folder in path.parents if (folder / ".hydra").is_dir()), None)
    if run is None:
        return "restore it from a complete copy"
    inside = path.relative_to(run)
    if inside.parts[0] == "evaluation":
        return f"{command('evaluate', run=run)} writes it again"
    if inside.parts[0] == ".hydra":
        return "restore it from a copy, or give the command that started the run again"
    return (
        f"restore it from a copy of the run, or delete it and summary.json and give\n"
        f"  {command('train', resume=run)}\n"
        "which writes them again from the last checkpoint"
    )
