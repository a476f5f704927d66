"""The libraries whose SAEs an export writes and an import reads, by the value of `format=`."""

from groupsae.interop.dictionary_learning import DICTIONARY_LEARNING
from groupsae.interop.library import Library, kind_of
from groupsae.interop.saelens import SAELENS
from groupsae.interop.sparsify import SPARSIFY
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE

FORMATS = {library.name: library for library in (SAELENS, SPARSIFY, DICTIONARY_LEARNING)}


def check_holds(library: Library, sae: SAE, group: str) -> None:
    """Raise UserError if a format cannot hold an SAE; the message names those that can."""
    kind = kind_of(sae)
    if kind not in library.kinds:
        others = [f"format={other.name}" for other in FORMATS.values() if kind in other.kinds]
        raise UserError(
            f"format={library.name} can hold {', '.join(library.kinds)} only, and {group} is a "
            f"{kind} SAE: use {' or '.join(others) or 'hub=... alone, which keeps our format'}."
        )
