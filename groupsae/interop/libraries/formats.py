"""The formats of other libraries, by name and by what lies in a folder."""

from groupsae.errors import UserError
from groupsae.interop.libraries.build import kind_of
from groupsae.interop.libraries.dictionary_learning import DICTIONARY_LEARNING
from groupsae.interop.libraries.format import Format
from groupsae.interop.libraries.saelens import SAELENS
from groupsae.interop.libraries.sparsify import SPARSIFY
from groupsae.sae.base import SAE

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
