"""The formats of other libraries, by name and by what lies in a folder."""

from groupsae.interop.dictionary_learning import DICTIONARY_LEARNING
from groupsae.interop.format import Format
from groupsae.interop.saelens import SAELENS
from groupsae.interop.sparsify import SPARSIFY
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.suite.build import kind_of

FORMATS: dict[str, Format] = {each.name: each for each in (SAELENS, SPARSIFY, DICTIONARY_LEARNING)}


def format_named(name: object) -> Format:
    """Return the format of this name.

    Raises:
        UserError: there is none.
    """
    found = FORMATS.get(str(name))
    if found is None:
        raise UserError(f"format is {name!r}; use {', '.join(FORMATS)}.")
    return found


def check_holds(chosen: Format, sae: SAE, group: str) -> None:
    """Raise UserError if a format cannot hold an SAE, with those that can."""
    kind = kind_of(sae)
    if kind not in chosen.holds:
        able = [each.name for each in FORMATS.values() if kind in each.holds]
        raise UserError(
            f"format={chosen.name} holds {', '.join(chosen.holds)} only, and {group} is a {kind} "
            f"SAE: use format={' or format='.join(able)}."
        )
