"""Reads the files of a run folder: JSON, YAML, csv, npz."""

import csv
import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped,unused-ignore]

from groupsae.runtime.errors import UserError


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
    """Return the object in a JSON file; None if there is no file.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path) from error
    if not isinstance(values, dict):
        raise damaged(path)
    return values


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; None if there is no file.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise damaged(path) from error


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """Return the (step, metric, value) rows of a `metrics.csv`; none if there is no file.

    A last line without an end was cut by a kill or a full disk, in the middle of its value maybe.
    """
    rows: list[tuple[int, str, float]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as handle:
            lines = [line for line in handle if line.endswith("\n")]
        for row in list(csv.reader(lines))[1:]:
            with suppress(ValueError):  # what a full disk cut and a later row went on with
                step, name, value = row
                rows.append((int(step), name, float(value)))
    return rows


def damaged(path: Path) -> UserError:
    """Return the error that says a file is not whole, and how to mend it."""
    return UserError(
        f"{path} is cut short or damaged: remove it and make it anew (evaluation/ by "
        "python -m groupsae.evaluate, the rest by training again)."
    )
