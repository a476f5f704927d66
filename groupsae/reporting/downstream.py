"""The tables of the parts of an evaluation that say what the model can still do.

Each is built from `evaluation/<part>.json`, `RunFiles.downstream[<part>]`, for the screen and the
report's section "What the model can still do". Every column needs a heading in `tables.HEADINGS`.
"""

from collections.abc import Callable, Sequence

from groupsae.reporting.load import RunFiles
from groupsae.reporting.tables import Table

Build = Callable[[RunFiles], Table | None]
DOWNSTREAM_TABLES: dict[str, Sequence[Build]] = {}  # by part
