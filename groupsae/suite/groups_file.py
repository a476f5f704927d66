"""Reads a run folder's `groups.json`: which layers share an SAE."""

from pathlib import Path

from groupsae.files.reading import damaged, read_json
from groupsae.grouping.plan import GroupPlan
from groupsae.runtime.errors import UserError


def load_plan(run: Path) -> GroupPlan | None:
    """Return the plan in a run folder's `groups.json`; None if there is no such file.

    Raises:
        UserError: the file is damaged, was edited by hand, or has another version.
    """
    file = run / "groups.json"
    stored = read_json(file)
    if stored is None:
        return None
    try:
        return GroupPlan.from_json(stored["plan"])
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise damaged(file) from error
