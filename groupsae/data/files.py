"""Documents from the user's own files: which files, and whether they can be read."""

import codecs
import glob
import hashlib
import json
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from groupsae.data.formats import (
    BINARY,
    KEY,
    OTHER_FORMS,
    TABLES,
    UnreadableError,
    endings,
    explain_read_errors,
    is_table,
    open_bytes,
    read,
)
from groupsae.data.sources import Document, legal_text
from groupsae.runtime.commands import argument
from groupsae.runtime.errors import UserError
from groupsae.runtime.ranks import is_leader
from groupsae.runtime.units import format_bytes

TEXT = (".txt", ".text", ".md", ".rst")  # in a folder too, these must be readable
NAMED = 5  # files that are left out, by name
CHUNK = 1 << 20  # bytes in one read


class _File(NamedTuple):
    name: str
    path: Path
    digest: str
    table: bool


class FileSource:
    """Text files, and tables with a column of text or token ids, as `formats` reads them.

    A text file is one document; above 64 KiB it is split at line ends into documents `name#0`,
    `name#1`, ... A row of a table is the document `name#row`. Names are relative to the folder
    (or to the fixed part of the glob), so the split does not depend on the folder's location. A
    file whose content was already seen is skipped, as in `PythonSource`.

    Nothing is read before `fingerprint` or `documents`; both first check all files, in one pass
    that also makes the content key. A warning names the files that are left out.

    Args:
        path: a file, a folder or a glob. A folder is read with all its sub-folders, links to
            folders included; hidden files and `__pycache__` are not looked at. Files that are not
            text are left out, and without `text_column` tables that have no usual column, too.
            Whatever a glob matches must be readable.
        text_column: column of a table that holds text or lists of token ids; None takes the first
            of `text`, `content`, `tokens`, `input_ids`.
    """

    def __init__(self, *, path: str, text_column: str | None = None) -> None:
        self.path, self.text_column = path, text_column

    def check(self) -> None:
        """Check that the path names something; quick, as no file is read.

        Raises:
            UserError: it does not exist, or the glob matches nothing.
        """
        _named(self.path)

    @cached_property
    def _files(self) -> list[_File]:
        """Return the distinct files in the order of their names, each checked to be readable."""
        root, paths = _named(self.path)
        in_folder = Path(self.path).expanduser().is_dir()
        files: list[_File] = []
        seen: set[str] = set()
        no_text: list[Path] = []
        no_column: dict[Path, UserError] = {}
        refused: list[UserError] = []
        for name, path in sorted((_name(path, root), path) for path in paths):
            try:
                file = self._checked(name, path)
            except UserError as error:
                unreadable = isinstance(error, UnreadableError)
                if in_folder and unreadable and endings(path)[0] not in (*TEXT, *TABLES):
                    no_text.append(path)
                elif in_folder and not unreadable and self.text_column is None:
                    no_column[path] = error
                else:
                    refused.append(error)
                continue
            if file.digest not in seen:
                files.append(file)
                seen.add(file.digest)
        if not files:
            refused += no_column.values()
        if refused:
            more = f" {len(refused) - 1} more files cannot be read." if refused[1:] else ""
            others = " (A glob such as data.path='<folder>/**/*.jsonl' leaves out others.)"
            raise UserError(f"{refused[0]}{more}{others * in_folder}")
        parts = []
        if no_text:
            plural = "file that is" if len(no_text) == 1 else "files that are"
            parts.append(_describe(f"{plural} not text", no_text, root))
        if no_column:
            plural = "table" if len(no_column) == 1 else "tables"
            what = f"{plural} without a usual column of text"
            parts.append(_describe(what, list(no_column), root))
            parts.append(f"{KEY}=<column> names another")
        notice = f"data.path={self.path}: left out {'; '.join(parts)}" if parts else ""
        if not files:
            raise UserError(
                f"no text in {root}. {notice or 'It has no files'}. Give another folder or a glob "
                "with data.path=..."
            )
        if notice and is_leader():
            warnings.warn(notice, stacklevel=1)
        if self.text_column is not None and not any(file.table for file in files):
            raise UserError(
                f"{KEY}={self.text_column}, but {self.path} has no table: its files, such as "
                f"{files[0].path}, are read as plain text. Leave {KEY} out, or give jsonl, csv, "
                "parquet, or json with one object a row"
            )
        return files

    def _checked(self, name: str, path: Path) -> _File:
        """Return a file that was found to be text, or a table with the column."""
        with explain_read_errors(path):
            table = is_table(path, self.text_column)
            ending, compression = endings(path)
            if ending in BINARY or (table and compression):  # rows are checked one by one
                with path.open("rb") as handle:
                    digest = hashlib.file_digest(handle, "sha256").hexdigest()
            else:
                digest = _text_digest(path)
        if table:
            next(read(name, path, self.text_column), None)
        return _File(name, path, digest, table)

    def fingerprint(self) -> str:
        """Return a key over the names and contents of the files and the column."""
        parts = [[file.name, file.digest] for file in self._files]
        return hashlib.sha256(json.dumps(["files", self.text_column, parts]).encode()).hexdigest()

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yield the documents, file by file in the order of their names."""
        every = (d for file in self._files for d in read(file.name, file.path, self.text_column))
        return legal_text(islice(every, start, None), f"data.path={self.path}")


def _named(path: str) -> tuple[Path, Iterable[Path]]:
    """Return the folder that names are relative to, and the files that a path names.

    Raises:
        UserError: the path does not exist, or is a glob that matches nothing.
    """
    if not path:
        raise UserError("no file is named: give a file, a folder or a glob with data.path=...")
    place = Path(path).expanduser()
    if place.is_file():
        return place.parent, [place]
    if place.is_dir():
        if (place / "dataset_dict.json").is_file() or (
            (place / "state.json").is_file() and any(place.glob("*.arrow"))
        ):
            raise UserError(
                f"data.path={path} was written by `save_to_disk` of datasets: use data=hf "
                + argument("data.name", path)
            )
        return place, _walk(place)
    # a folder whose name has brackets is that folder: only what follows is a pattern
    parts = place.parts
    fixed = next(n for n in range(len(parts), -1, -1) if Path(*parts[:n]).exists())
    root, pattern = Path(*parts[:fixed]), str(Path(*parts[fixed:]))
    if not glob.has_magic(pattern):
        raise UserError(
            f"data.path={path} does not exist (looked for {place.absolute()}): give a file, a "
            "folder or a glob; a data set of the Hub is data=hf data.name=<id>"
        )
    found = glob.iglob(pattern, root_dir=root, recursive=True)
    files = [root / name for name in found if (root / name).is_file()]
    if not files:
        raise UserError(
            f"data.path={path} matches no file (read from {Path.cwd()}): correct the pattern; "
            "'**' goes through sub-folders, and the shell must not expand it, so quote it"
        )
    return root, files


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files of a folder and of its sub-folders, each folder once, without hidden ones.

    Links to folders come last: what lies below the root is reached by its own name. A folder that
    may not be listed and a link to nothing are yielded, so that they are named as unreadable.
    """
    folders, seen = deque([root]), set()
    while folders:
        folder = folders.popleft()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        try:
            inside = sorted(folder.iterdir())
        except PermissionError:
            yield folder
            continue
        for path in inside:
            if path.name.startswith(".") or path.name == "__pycache__":
                continue
            if path.is_dir():
                (folders.append if path.is_symlink() else folders.appendleft)(path)
            elif path.is_file() or not path.exists():  # no sockets or pipes
                yield path


def _name(path: Path, root: Path) -> str:
    """Return the name relative to the root, as text whatever bytes it has."""
    name = path.relative_to(root).as_posix()
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _describe(what: str, files: list[Path], root: Path) -> str:
    """Return what is left out, in one line."""
    size = format_bytes(sum(path.stat().st_size for path in files if path.is_file()))
    names = [_name(path, root) for path in files[:NAMED]] + ["..."] * (len(files) > NAMED)
    return f"{len(files):,} {what} ({size}): {', '.join(names)}"


def _text_digest(path: Path) -> str:
    """Return the SHA-256 of a text in hex, of the decompressed one if it is compressed.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        UnreadableError: it has a NUL byte.
    """
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    with open_bytes(path) as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
            if b"\0" in chunk:
                raise UnreadableError(f"{path} is not text: it has NUL bytes. {OTHER_FORMS}")
            decoder.decode(chunk)
    decoder.decode(b"", final=True)
    return digest.hexdigest()
