"""Where text comes from: each source yields named documents in a fixed order."""

import hashlib
import json
import math
import re
import reprlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from groupsae.runtime.errors import UserError

USUAL_COLUMNS = ("text", "content", "tokens", "input_ids")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One document: its name (decides the split) and its text, or its tokens if it has them."""

    name: str
    text: str | None = None
    token_ids: list[int] | None = None


@runtime_checkable
class Source(Protocol):
    """Anything that can be packed into token blocks."""

    def fingerprint(self) -> str:
        """Return a key that changes whenever the documents change."""
        ...

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yield the documents from the given one on, always in the same order."""
        ...


def files_fingerprint(files: list[tuple[str, Path]]) -> str:
    """Return the SHA-256 over names and contents of (name, path) pairs, in hex."""
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()


def pick_column(columns: Sequence[str], wanted: str | None, where: str, key: str) -> str:
    """Return the column of a table to read; `wanted` None takes the first of `USUAL_COLUMNS`.

    The message names `where`, the file or data set, and `key`, which chooses the column.

    Raises:
        UserError: the wanted column is missing, or none has a usual name.

    >>> pick_column(["id", "content", "tokens"], None, "a.jsonl", "data.text_column")
    'content'
    """
    candidates = USUAL_COLUMNS if wanted is None else (wanted,)
    for column in candidates:
        if column in columns:
            return column
    present = ", ".join(map(reprlib.repr, columns)) or "none"  # a name may be a line of text
    missing = "no column named " + " or ".join(map(repr, candidates))
    raise UserError(f"{where} has {missing}. It has: {present}. Choose one with {key}=...")


def row_document(name: str, value: Any, column: str, where: str) -> Document:
    """Return the document in one row: text, or token ids.

    An empty or missing value (None, NaN) gives a document of no tokens, so that rows and documents
    are counted alike and packing can resume at a row.

    Raises:
        UserError: the value is neither text nor a list of integers.
    """
    empty = isinstance(value, str | list) and not value
    if value is None or empty or (isinstance(value, float) and math.isnan(value)):
        return Document(name, token_ids=[])
    if isinstance(value, str):
        return Document(name, text=value)
    integers = isinstance(value, list) and all(type(token) is int for token in value)
    if integers and min(value) >= -(2**63) and max(value) < 2**63:
        return Document(name, token_ids=value)
    kind = type(value).__name__
    raise UserError(
        f"{where}: column {column!r} holds {kind} ({str(value)[:40]}), while text or a list of "
        "token ids is needed. Choose another column."
    )


def legal_text(documents: Iterable[Document], where: str) -> Iterator[Document]:
    """Yield the documents with U+FFFD in place of lone surrogates, which no tokenizer reads.

    JSON may hold half of a pair, an emoji that was truncated. At the end a warning gives the
    number of documents that were changed.
    """
    changed, first = 0, ""
    try:
        for document in documents:
            try:
                (document.text or "").encode()
            except UnicodeEncodeError:
                changed, first = changed + 1, first or document.name
                legal = _SURROGATE.sub("\ufffd", document.text or "")
                document = document._replace(text=legal)
            yield document
    finally:
        if changed:
            warnings.warn(
                f"{where}: U+FFFD replaces half a character (a lone surrogate, or a byte that is "
                f"not UTF-8) in {changed:,} document(s); the first is {first}",
                stacklevel=2,
            )


class PythonSource:
    """Python source files: the running interpreter's standard library, and packages if asked.

    Names are paths relative to the library folder, so the held-out files are the same on every
    machine. A file whose content was already seen is skipped: a copy must not put a held-out
    text into the training set.

    Args:
        packages: also read the source of every package installed in this environment.
    """

    def __init__(self, *, packages: bool = False) -> None:
        paths = sysconfig.get_paths()
        self.roots = [Path(paths[name]) for name in ("stdlib", "purelib")[: 1 + packages]]

    def _files(self) -> list[tuple[str, Path]]:
        """Return (name, path) of every file, sorted by name."""
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        files = []
        for root in self.roots:
            for path in root.rglob("*.py"):
                relative = path.relative_to(root)
                if not skipped.intersection(relative.parts):
                    files.append((relative.as_posix(), path))
        if not files:
            raise UserError(
                f"no Python source found under {', '.join(map(str, self.roots))}: this "
                "interpreter ships without its library's source. Use data=files data.path=..."
            )
        return sorted(files)

    def fingerprint(self) -> str:
        """Return a key over all names and contents."""
        return files_fingerprint(self._files())

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yield each distinct file that is valid UTF-8."""
        return islice(self._documents(), start, None)

    def _documents(self) -> Iterator[Document]:
        seen: set[bytes] = set()
        for name, path in self._files():
            raw = path.read_bytes()
            key = hashlib.sha256(raw).digest()
            if key in seen or not raw.strip():
                continue
            seen.add(key)
            try:
                yield Document(name, raw.decode("utf-8"))
            except UnicodeDecodeError:
                continue  # the library's tests hold files in odd encodings on purpose
