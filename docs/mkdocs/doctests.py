"""Examples in docstrings are shown as Python sessions, not as nested quotations."""

import re
from typing import Any

from griffe import Extension, Object

SESSION = re.compile(r"(?:^|\n\n)((?:>>> |\.\.\. ).*(?:\n.+)*)")


class Doctests(Extension):
    """Puts a fence around every paragraph that begins with a prompt."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            fenced = SESSION.sub(r"\n\n```pycon\n\1\n```", obj.docstring.value)
            obj.docstring.value = fenced.strip()
