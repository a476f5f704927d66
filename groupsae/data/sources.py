"""Where text comes from: each source yields named documents in a fixed order."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from groupsae.runtime.errors import UserError


class Document(NamedTuple):
    """One document: its name (decides the split) and its text, or its tokens if it has them."""

    name: str
    text: str | None = None
    token_ids: list[int] | None = None


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
        self.roots = [Path(paths["stdlib"])]
        if packages:
            self.roots.append(Path(paths["purelib"]))

    def _files(self) -> list[tuple[str, Path]]:
        """Return (name, path) of every file, sorted by name."""
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        found = []
        for root in self.roots:
            for path in root.rglob("*.py"):
                relative = path.relative_to(root)
                if not skipped.intersection(relative.parts):
                    found.append((relative.as_posix(), path))
        if not found:
            raise UserError(
                f"no Python source found under {', '.join(map(str, self.roots))}: this "
                "interpreter ships without its library's source. Use data=files data.path=..."
            )
        return sorted(found)

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
