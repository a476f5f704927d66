"""Documents from the user's own files: plain text, JSON lines and parquet."""

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from groupsae.data.sources import Document, pick_column, row_document
from groupsae.runtime.errors import UserError

PARQUET = ".parquet"
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
TEXT = (".txt", ".text", ".md", ".rst", ".py")
PIECE = 64 * 1024  # characters: one long file still gives training and held-out documents
CHUNK = 1 << 20  # bytes checked in one read
SNIFF = 1 << 16  # bytes that decide whether a file of unknown kind is text
KEY = "data.text_column"


class _File(NamedTuple):
    name: str
    path: Path
    digest: str


class FileSource:
    """Text files, JSON lines (`.jsonl`, `.ndjson`, `.json.gz`) and parquet files.

    A text file is one document; above 64 KiB it is split at line ends into documents `name#0`,
    `name#1`, ... A row of a table is the document `name#row`. Names are relative to the folder
    (or to the fixed part of the glob), so the split does not depend on the folder's location. A
    file whose content was already seen is skipped, as in `PythonSource`.

    Nothing is read before `fingerprint` or `documents`; both first check all files, in one pass
    that also makes the content key.

    Args:
        path: a file, a folder (read with all its sub-folders; hidden files and files that are
            not text are left out) or a glob (whatever it matches must be text).
        text_column: column of JSON lines and parquet files that holds text or lists of token
            ids; None takes the first of `text`, `content`, `tokens`, `input_ids`.
    """

    def __init__(self, *, path: str, text_column: str | None = None) -> None:
        self.path, self.text_column = path, text_column

    @cached_property
    def _files(self) -> list[_File]:
        """Return the distinct files in the order of their names, each checked to be readable."""
        files: list[_File] = []
        seen: set[str] = set()
        for name, path in _find_files(self.path):
            digest = _read_checked(path)
            if digest in seen:
                continue
            seen.add(digest)
            if path.name.endswith(PARQUET):
                self._open_parquet(path)
            elif path.name.endswith(JSON_LINES):
                next(self._json_rows(path), None)
            files.append(_File(name, path, digest))
        return files

    def fingerprint(self) -> str:
        """Return a key over the names and contents of the files and the column."""
        parts = [[file.name, file.digest] for file in self._files]
        return hashlib.sha256(json.dumps(["files", self.text_column, parts]).encode()).hexdigest()

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yield the documents, file by file in the order of their names."""
        return islice(self._documents(), start, None)

    def _documents(self) -> Iterator[Document]:
        for name, path, _ in self._files:
            if path.name.endswith(PARQUET):
                yield from self._parquet(name, path)
            elif path.name.endswith(JSON_LINES):
                for row, column, value in self._json_rows(path):
                    yield row_document(f"{name}#{row}", value, column, f"{path}:{row + 1}")
            else:
                yield from _pieces(name, path)

    def _json_rows(self, path: Path) -> Iterator[tuple[int, str, Any]]:
        """Yield (row, column, value) of a file of JSON lines; blank lines are skipped."""
        example = 'every line of a .jsonl file must be one object such as {"text": "..."}'
        try:
            with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as handle:
                for row, line in enumerate(handle):
                    if not line.strip():
                        continue
                    where = f"{path}:{row + 1}"
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{where} is not JSON ({error}): {example}") from None
                    if not isinstance(record, dict):
                        raise UserError(f"{where} holds {type(record).__name__}, while {example}")
                    column = pick_column(list(record), self.text_column, where, KEY)
                    yield row, column, record[column]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged or truncated: {error}") from None

    def _open_parquet(self, path: Path) -> tuple[Any, str]:
        """Return the open file and the column to read."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(path)
        except pa.ArrowException as error:
            raise UserError(f"{path} is no complete parquet file: {error}") from None
        schema = table.schema_arrow
        column = pick_column(schema.names, self.text_column, str(path), KEY)
        kind = schema.field(column).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not text and not (lists and pa.types.is_integer(kind.value_type)):
            raise UserError(
                f"{path}: column {column!r} is of type {kind}, while text or a list of token ids "
                f"is needed. It has: {', '.join(schema.names)}. Choose one with {KEY}=..."
            )
        return table, column

    def _parquet(self, name: str, path: Path) -> Iterator[Document]:
        table, column = self._open_parquet(path)
        batches = table.iter_batches(batch_size=256, columns=[column])
        values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for row, value in enumerate(values):
            yield row_document(f"{name}#{row}", value, column, f"{path}, row {row}")


def _pieces(name: str, path: Path) -> Iterator[Document]:
    """Yield a text file as one document, or split at line ends when it is long."""
    short = path.stat().st_size <= PIECE
    with path.open(encoding="utf-8-sig", newline="") as handle:
        number = 0
        while text := handle.read(PIECE):
            # The second limit: a file may be one endless line.
            text += "" if text.endswith("\n") else handle.readline(PIECE)
            if text.strip():
                yield Document(name if short else f"{name}#{number}", text=text)
            number += 1


def _find_files(path: str) -> list[tuple[str, Path]]:
    """Return (name, path) of the files that a file, folder or glob names, sorted by name.

    Raises:
        UserError: the path does not exist, or nothing in it can be read.
    """
    if not path:
        raise UserError("no file is named: give a file, a folder or a glob with data.path=...")
    place = Path(path).expanduser()
    if place.is_file():
        return [(place.name, place)]
    if place.is_dir():
        root = place
        inside = [p for p in place.rglob("*") if p.is_file() and not _hidden(p, place)]
        files = [
            p for p in inside if p.name.endswith((PARQUET, *JSON_LINES, *TEXT)) or _is_text(p)
        ]
        if not files:
            raise UserError(
                f"no text in {place}: it has {len(inside)} files, and none is txt, jsonl, parquet "
                "or any other text. Give another folder or a glob with data.path=..."
            )
    elif glob.has_magic(path):
        fixed = [i for i, part in enumerate(place.parts) if glob.has_magic(part)][0]
        root = Path(*place.parts[:fixed])
        files = [Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file()]
        if not files:
            raise UserError(
                f"data.path={path} matches no file (read from {Path.cwd()}): correct the pattern; "
                "'**' goes through sub-folders, and the shell must not expand it, so quote it"
            )
    else:
        raise UserError(
            f"data.path={path} does not exist (looked for {place.absolute()}): give a file, a "
            "folder or a glob"
        )
    return sorted((p.relative_to(root).as_posix(), p) for p in files)


def _hidden(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return "__pycache__" in parts or any(part.startswith(".") for part in parts)


def _is_text(path: Path) -> bool:
    """Return whether the start of a file of unknown kind is UTF-8 without NUL bytes."""
    with path.open("rb") as handle:
        start = handle.read(SNIFF)
    bad = _bad_byte(start)
    return bad is None or (len(start) == SNIFF and bad > SNIFF - 4)  # half a character at the end


def _bad_byte(text: bytes) -> int | None:
    """Return the position of the first byte that is not text."""
    nul = text.find(b"\0")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start if nul < 0 else min(nul, error.start)
    return None if nul < 0 else nul


def _read_checked(path: Path) -> str:
    """Return the SHA-256 of a file in hex, having checked that it is text if it claims to be.

    Raises:
        UserError: the file cannot be opened, or is not UTF-8 text; the message names the byte.
    """
    digest, offset = hashlib.sha256(), 0
    claims_text = not path.name.endswith((PARQUET, ".gz"))
    try:
        with path.open("rb") as handle:
            # complete lines: no character is in two chunks
            while chunk := b"".join(handle.readlines(CHUNK)):
                digest.update(chunk)
                bad = _bad_byte(chunk) if claims_text else None
                if bad is not None:
                    what = "invalid UTF-8" if chunk[bad] else "a NUL byte"
                    raise UserError(
                        f"{path} is not text: {what} at byte {offset + bad}. Give UTF-8 text, "
                        "jsonl or parquet; `iconv -t UTF-8` converts other encodings"
                    )
                offset += len(chunk)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
