"""How each kind of text file is read: plain text, JSON, csv, parquet and arrow, compressed or not.

`COMPRESSIONS` and `TABLES` list the endings; any other file is plain text. Endings are compared
without regard to case.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from groupsae.data.sources import USUAL_COLUMNS, Document, pick_column, row_document
from groupsae.runtime.errors import UserError

# (name, path, wanted column) to documents
Reader = Callable[[str, Path, str | None], Iterator[Document]]

PIECE = 64 * 1024  # characters: one long file still gives training and held-out documents
KEY = "data.text_column"
OTHER_FORMS = (
    "Give UTF-8 text, jsonl, csv or parquet; `iconv -f LATIN1 -t UTF-8` converts text from LATIN1 "
    "(or UTF-16, or another encoding)"
)
ROW = 'a row must be an object such as {"text": "..."}'

csv.field_size_limit(2**31 - 1)  # the library's limit refuses texts above 128 KiB


class UnreadableError(UserError):
    """A file cannot be read as text: it is binary, damaged, or may not be opened."""


# ---- opening ----------------------------------------------------------------------------------


def open_zst(source: Any, **_: Any) -> io.BufferedReader:
    """Return a stream of the decompressed bytes of a file, or of a stream."""
    return io.BufferedReader(pa.CompressedInputStream(source, "zstd"))  # pyarrow's has no lines


COMPRESSIONS: dict[str, Callable[[Path], io.BufferedIOBase]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zst,
}


def endings(path: Path) -> tuple[str, str]:
    """Return the ending that tells the kind of a file, and that of its compression.

    >>> endings(Path("Corpus.JSONL.gz")), endings(Path("notes.txt")), endings(Path("a.b/notes"))
    (('.jsonl', '.gz'), ('.txt', ''), ('', ''))
    """
    name = Path(path.name.lower())
    compression = name.suffix if name.suffix in COMPRESSIONS else ""
    return Path(name.name.removesuffix(compression)).suffix, compression


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Return a stream of the bytes of a file, decompressed if its name says that it must be."""
    compression = endings(path)[1]
    return COMPRESSIONS[compression](path) if compression else path.open("rb")


def _open_characters(path: Path) -> io.TextIOWrapper:
    handle: Any = open_bytes(path)  # any stream of bytes will do
    return io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")


def _open_anywhere(path: Path) -> Any:
    """Return what pyarrow can read at any place: a compressed file is read to memory."""
    if not endings(path)[1]:
        return pa.memory_map(str(path))
    with open_bytes(path) as handle:
        return pa.BufferReader(handle.read())


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turn the errors of opening, decompressing and decoding a file into `UnreadableError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path} is not text: {error.reason}. {OTHER_FORMS}") from None
    except OSError as error:
        if error.errno is not None:
            raise UnreadableError(f"{path} cannot be read: {error.strerror}") from None
        raise UnreadableError(f"{path} is damaged or truncated: {error}") from None
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise UnreadableError(f"{path} is damaged or truncated: {error}") from None


# ---- which reader -----------------------------------------------------------------------------


def is_table(path: Path, wanted: str | None) -> bool:
    """Return whether a file has rows; otherwise it is plain text.

    A `.json` file is a table if it is an array of objects, or has one object a line; a single
    object only if it has the column that is wanted. Any other JSON is text, as source code is.
    """
    ending = endings(path)[0]
    if ending != ".json" or _is_array(path):
        return ending in TABLES
    with open_bytes(path) as handle:
        lines = (line for line in handle if line.strip())
        try:
            first = json.loads(next(lines, b"null"))
        except (ValueError, RecursionError):
            return False
        if not isinstance(first, dict):
            return False
        columns = USUAL_COLUMNS if wanted is None else (wanted,)
        return not first.keys().isdisjoint(columns) or next(lines, None) is not None


def read(name: str, path: Path, wanted: str | None) -> Iterator[Document]:
    """Yield the documents of one file; `wanted` is the column of a table, as in `pick_column`.

    Raises:
        UserError: a row is not what its kind of table holds; the message names the line.
        UnreadableError: the file is damaged.
    """
    reader = TABLES[endings(path)[0]] if is_table(path, wanted) else _pieces
    with explain_read_errors(path):
        yield from reader(name, path, wanted)


# ---- text -------------------------------------------------------------------------------------


def _pieces(name: str, path: Path, _: str | None) -> Iterator[Document]:
    """Yield a text file as one document, or split at line ends when it is long."""
    with open_bytes(path) as handle:
        short = len(handle.read(PIECE + 1)) <= PIECE
    with _open_characters(path) as text_file:
        number = 0
        while text := text_file.read(PIECE):
            # The second limit: a file may be one endless line.
            text += "" if text.endswith("\n") else text_file.readline(PIECE)
            if text.strip():
                yield Document(name if short else f"{name}#{number}", text=text)
            number += 1


# ---- JSON -------------------------------------------------------------------------------------


def _json(name: str, path: Path, wanted: str | None) -> Iterator[Document]:
    """Yield the rows of JSON lines, or of an array of objects, whatever the ending says.

    A row without a column that the first row has is an empty document.
    """
    rows = _array_elements(path) if _is_array(path) else _lines(path)
    first, missing, without = None, 0, ""
    try:
        for row, where, record in rows:
            if not isinstance(record, dict):
                raise UserError(f"{where} holds {type(record).__name__}, while {ROW}")
            try:
                column = pick_column(list(record), wanted, where, KEY)
            except UserError:
                if first is None:
                    raise
                missing, without = missing + 1, without or where
                yield row_document(f"{name}#{row}", None, first, where)
                continue
            first = first or column
            yield row_document(f"{name}#{row}", record[column], column, where)
    finally:
        if missing:
            warnings.warn(
                f"{path}: {missing:,} row(s) without the column {first!r} count as empty; the "
                f"first is {without}",
                stacklevel=2,
            )


def _lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (row, where, value) of every line that is not blank."""
    with open_bytes(path) as handle:
        for row, line in enumerate(handle):
            if line.strip():
                where = f"{path}:{row + 1}"
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is not JSON ({error}): {ROW}, on one line") from None
                yield row, where, value


def _is_array(path: Path) -> bool:
    """Return whether a file begins like an array of objects."""
    with open_bytes(path) as handle:
        start = handle.read(4096).removeprefix(b"\xef\xbb\xbf")
    return re.match(rb"\s*\[\s*[{\]]", start) is not None


def _array_elements(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (row, where, element) of a JSON array, which is read to memory."""
    with open_bytes(path) as handle:
        try:
            elements = json.loads(handle.read())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}): {ROW}, in one array") from None
    for row, element in enumerate(elements):
        yield row, f"{path}, row {row}", element


# ---- csv --------------------------------------------------------------------------------------


def _csv(name: str, path: Path, wanted: str | None) -> Iterator[Document]:
    """Yield the rows of a csv or tsv file; the first line has the names of the columns.

    Fields are separated by whichever of comma, tab, semicolon and | is most frequent in that line.
    """
    with _open_characters(path) as handle:
        line = next(filter(str.strip, handle), "")
        separator = max(",\t;|", key=line.count)
        rows = csv.reader(chain([line], handle), delimiter=separator, strict=True)
        try:
            if not (header := next(rows)):  # an empty file
                return
            column = pick_column(header, wanted, str(path), KEY)
            place = header.index(column)
            for row, fields in enumerate(filter(None, rows)):
                where = f"{path}:{rows.line_num}"
                if len(fields) != len(header):
                    raise UserError(
                        f"the row that ends at {where} has {len(fields)} fields, while the first "
                        f"line has {len(header)}, separated by {separator!r}: put texts with "
                        'separators, quotes or line ends in "quotes"'
                    )
                yield row_document(f"{name}#{row}", fields[place], column, where)
        except csv.Error as error:
            raise UserError(
                f"{path}:{rows.line_num} is not csv ({error}): a text with quotes must be in "
                'quotes, and those inside doubled (""). jsonl has no such rules'
            ) from None


# ---- parquet and arrow ------------------------------------------------------------------------


def _parquet(name: str, path: Path, wanted: str | None) -> Iterator[Document]:
    from pyarrow import parquet

    with _open_anywhere(path) as source:
        table = parquet.ParquetFile(source)
        column = pick_column(table.schema_arrow.names, wanted, str(path), KEY)
        batches = table.iter_batches(batch_size=256, columns=[column])
        arrays = (batch.column(0) for batch in batches)
        yield from _arrow_documents(name, path, column, arrays)


def _arrow(name: str, path: Path, wanted: str | None) -> Iterator[Document]:
    """Yield the rows of an Arrow file (feather) or stream (as `datasets` writes)."""
    with _open_anywhere(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            table = pa.ipc.open_file(source)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = table = pa.ipc.open_stream(source)
        column = pick_column(table.schema.names, wanted, str(path), KEY)
        yield from _arrow_documents(
            name, path, column, (batch.column(column) for batch in batches)
        )


def _arrow_documents(
    name: str, path: Path, column: str, arrays: Iterable[pa.Array]
) -> Iterator[Document]:
    for row, value in enumerate(chain.from_iterable(map(_values, arrays))):
        yield row_document(f"{name}#{row}", value, column, f"{path}, row {row}")


def _values(array: pa.Array) -> list[Any]:
    """Return the values; of invalid UTF-8, which some writers leave there, as lone surrogates."""
    try:
        return cast(list[Any], array.to_pylist())
    except UnicodeDecodeError:
        values = array.cast(pa.large_binary()).to_pylist()
        return [v if v is None else v.decode("utf-8", "surrogateescape") for v in values]


TABLES: dict[str, Reader] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,  # unless it is one document: `is_table`
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}
BINARY = (".parquet", ".arrow", ".feather")
