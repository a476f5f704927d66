"""Copies: documents with exactly the same content as one that was packed before."""

import os
from pathlib import Path

import numpy as np
import xxhash

from groupsae.data.sources import Document


def content_of(document: Document) -> int | None:
    """Return 64 bits (XXH3) of a document's text, or of its token ids; None if it has neither.

    >>> content_of(Document("a", text="same")) == content_of(Document("b", text="same"))
    True
    """
    if document.token_ids is None:
        return xxhash.xxh3_64_intdigest((document.text or "").encode("utf-8", "surrogatepass"))
    if not document.token_ids:
        return None
    return xxhash.xxh3_64_intdigest(repr(document.token_ids).encode())


class Contents:
    """The contents that were packed, in memory and in a file: 8 bytes a document in each.

    Args:
        file: its first `count` entries count; `flush` overwrites the others.
        count: number of contents in the file.
    """

    def __init__(self, file: Path, count: int) -> None:
        self.file, self.count = file, count
        self._known = np.sort(np.fromfile(file, np.uint64, count))
        self._new: dict[int, None] = {}  # in order

    def add(self, content: int) -> bool:
        """Add a content; return whether it is new."""
        place = int(np.searchsorted(self._known, np.uint64(content)))
        known = place < len(self._known) and int(self._known[place]) == content
        if known or content in self._new:
            return False
        self._new[content] = None
        return True

    def flush(self) -> None:
        """Bring new contents to disk."""
        new = np.fromiter(self._new, np.uint64, len(self._new))
        write_at(self.file, 8 * self.count, new)
        self._known = np.sort(np.concatenate([self._known, new]), kind="stable")
        self.count += len(new)
        self._new.clear()


def write_at(file: Path, position: int, values: np.ndarray) -> None:
    """Write values to disk at a position, and nothing after them.

    Not simply at the end: a flush that broke off (disk full) left something there.
    """
    with file.open("r+b") as handle:
        handle.seek(position)
        handle.truncate()
        handle.write(values.tobytes())
        handle.flush()
        os.fsync(handle.fileno())
