"""Documents from the user's own files: plain text, JSON lines and parquet."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from groupsae.data.columns import pick_column, row_document
from groupsae.data.paths import PARQUET, find_files, is_json_lines, read_checked
from groupsae.data.sources import Document
from groupsae.runtime.errors import UserError

PIECE = 64 * 1024  # characters: one long file still gives training and held-out documents
KEY = "data.text_column"


class _File(NamedTuple):
    name: str
    path: Path
    digest: str


class FileSource:
    """Text files, JSON lines (`.jsonl`, `.ndjson`, `.json.gz`) and parquet files.

    A text file is one document; above 64 KiB it is cut at line ends into documents `name#0`,
    `name#1`, ... A row of a table is the document `name#row`. Names are relative to the folder
    (or to the fixed part of the glob), so the split does not depend on where the folder lies. A
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
        for name, path in find_files(self.path):
            digest = read_checked(path)
            if digest in seen:
                continue
            seen.add(digest)
            if path.name.endswith(PARQUET):
                self._open_parquet(path)
            elif is_json_lines(path):
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
            elif is_json_lines(path):
                for row, column, value in self._json_rows(path):
                    yield row_document(f"{name}#{row}", value, column, f"{path}:{row + 1}")
            else:
                yield from _pieces(name, path)

    def _json_rows(self, path: Path) -> Iterator[tuple[int, str, Any]]:
        """Yield (row, column, value) of a file of JSON lines; blank lines are no rows to read."""
        try:
            with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as handle:
                for row, line in enumerate(handle):
                    if not line.strip():
                        continue
                    where = f"{path}:{row + 1}"
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        raise UserError(
                            f"{where} is not JSON ({error}): every line of a .jsonl file must be "
                            'one object such as {"text": "..."}'
                        ) from None
                    if not isinstance(record, dict):
                        raise UserError(
                            f"{where} holds {type(record).__name__}, while every line must be one "
                            'object such as {"text": "..."}'
                        )
                    column = pick_column(list(record), self.text_column, where, KEY)
                    yield row, column, record[column]
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged or cut short: {error}") from None

    def _open_parquet(self, path: Path) -> tuple[Any, str]:
        """Return the open file and the column to read."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(path)
        except pa.ArrowException as error:
            raise UserError(f"{path} is no whole parquet file: {error}") from None
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
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield row_document(f"{name}#{row}", value, column, f"{path}, row {row}")
                row += 1


def _pieces(name: str, path: Path) -> Iterator[Document]:
    """Yield a text file as one document, or cut at line ends when it is long."""
    whole = path.stat().st_size <= PIECE
    with path.open(encoding="utf-8-sig", newline="") as handle:
        number = 0
        while text := handle.read(PIECE):
            # The second limit: a file may be one endless line.
            text += "" if text.endswith("\n") else handle.readline(PIECE)
            if text.strip():
                yield Document(name if whole else f"{name}#{number}", text=text)
            number += 1
