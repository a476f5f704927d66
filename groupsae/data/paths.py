"""Which files a path stands for, and whether they can be read as text."""

import codecs
import glob
import hashlib
from pathlib import Path

from groupsae.runtime.errors import UserError

PARQUET = ".parquet"
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
TEXT = (".txt", ".text", ".md", ".rst", ".py")
CHUNK = 1 << 20
SNIFF = 1 << 16


def is_json_lines(path: Path) -> bool:
    """Return whether the name says that every line of the file is a JSON object."""
    return path.name.endswith(JSON_LINES)


def find_files(path: str) -> list[tuple[str, Path]]:
    """Return (name, path) of the files that a file, folder or glob stands for, sorted by name.

    Raises:
        UserError: the path does not exist, or nothing in it can be read.
    """
    if not path:
        raise UserError("no file is named: give a file, a folder or a glob with data.path=...")
    place = Path(path).expanduser()
    if place.is_file():
        return [(place.name, place)]
    if place.is_dir():
        inside = [p for p in place.rglob("*") if p.is_file() and not _hidden(p, place)]
        files = [p for p in inside if _known(p) or _looks_like_text(p)]
        if not files:
            raise UserError(
                f"no text in {place}: it has {len(inside)} files, and none is txt, jsonl, parquet "
                "or any other text. Give another folder or a glob with data.path=..."
            )
        root = place
    elif glob.has_magic(path):
        files = [Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file()]
        if not files:
            raise UserError(
                f"data.path={path} matches no file (read from {Path.cwd()}): mend the pattern; "
                "'**' goes through sub-folders, and the shell must not expand it, so quote it"
            )
        fixed = [i for i, part in enumerate(place.parts) if glob.has_magic(part)][0]
        root = Path(*place.parts[:fixed])
    else:
        raise UserError(
            f"data.path={path} does not exist (looked for {place.absolute()}): give a file, a "
            "folder or a glob"
        )
    return sorted((p.relative_to(root).as_posix(), p) for p in files)


def _hidden(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return "__pycache__" in parts or any(part.startswith(".") for part in parts)


def _known(path: Path) -> bool:
    return path.name.endswith((PARQUET, *JSON_LINES, *TEXT))


def _looks_like_text(path: Path) -> bool:
    """Return whether the start of a file of unknown kind is UTF-8 without NUL bytes."""
    with path.open("rb") as handle:
        return _bad_byte(handle.read(SNIFF), codecs.getincrementaldecoder("utf-8")()) is None


def _bad_byte(chunk: bytes, decoder: codecs.IncrementalDecoder, final: bool = False) -> int | None:
    """Return where in the chunk the first byte stands that is not text (negative: before it)."""
    waiting = len(decoder.getstate()[0])
    nul = chunk.find(b"\0")
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        invalid = error.start - waiting
        return invalid if nul < 0 else min(nul, invalid)
    return None if nul < 0 else nul


def read_checked(path: Path) -> str:
    """Return the SHA-256 of a file in hex, having checked that it is text if it claims to be.

    Raises:
        UserError: the file cannot be opened, or is not UTF-8 text; the message names the byte.
    """
    digest = hashlib.sha256()
    is_text = not path.name.endswith((PARQUET, ".gz"))
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with path.open("rb") as handle:
            while True:
                chunk = handle.read(CHUNK)
                digest.update(chunk)
                bad = _bad_byte(chunk, decoder, final=not chunk) if is_text else None
                if bad is not None:
                    at = max(0, offset + bad)
                    nul = bad >= 0 and chunk[bad : bad + 1] == b"\0"
                    what = "a NUL byte" if nul else "invalid UTF-8"
                    raise UserError(
                        f"{path} is not text: {what} at byte {at}. Give UTF-8 text, jsonl or "
                        "parquet; `iconv -t UTF-8` converts other encodings"
                    )
                if not chunk:
                    return digest.hexdigest()
                offset += len(chunk)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
