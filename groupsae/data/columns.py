"""Rows of tables and JSON lines: which column holds the documents, and what is in it."""

from collections.abc import Sequence
from typing import Any

from groupsae.data.sources import Document
from groupsae.runtime.errors import UserError

USUAL_COLUMNS = ("text", "content", "tokens", "input_ids")


def pick_column(columns: Sequence[str], wanted: str | None, where: str, key: str) -> str:
    """Return the column to read: the wanted one, or the first of the usual names when null.

    Args:
        columns: the columns that there are.
        wanted: the column asked for; None looks for `text`, `content`, `tokens`, `input_ids`.
        where: the file or data set, for the message.
        key: the configuration key that chooses the column, for the message.

    Raises:
        UserError: the wanted column is missing, or none has a usual name.

    >>> pick_column(["id", "content", "tokens"], None, "a.jsonl", "data.text_column")
    'content'
    """
    candidates = USUAL_COLUMNS if wanted is None else (wanted,)
    for column in candidates:
        if column in columns:
            return column
    found = ", ".join(map(repr, columns)) or "none"
    missing = "no column named " + " or ".join(map(repr, candidates))
    raise UserError(f"{where} has {missing}. It has: {found}. Choose one with {key}=...")


def row_document(name: str, value: Any, column: str, where: str) -> Document:
    """Return the document in one row: text, or the token ids it already consists of.

    An empty or missing value gives a document of no tokens, so that rows and documents are
    counted alike and packing can go on at a row.

    Raises:
        UserError: the value is neither text nor a list of whole numbers.
    """
    if value is None or (isinstance(value, str | list) and not value):
        return Document(name, token_ids=[])
    if isinstance(value, str):
        return Document(name, text=value)
    if isinstance(value, list) and all(type(token) is int for token in value):
        return Document(name, token_ids=value)
    kind = type(value).__name__
    raise UserError(
        f"{where}: column {column!r} holds {kind} ({str(value)[:40]}), while text or a list of "
        "token ids is needed. Choose another column."
    )
