"""Documents streamed from a Hugging Face data set, on the Hub or in a local folder."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tenacity import RetryCallState

from groupsae.data.sources import (
    Document,
    files_fingerprint,
    legal_text,
    pick_column,
    row_document,
)
from groupsae.runtime.commands import argument
from groupsae.runtime.errors import UserError
from groupsae.runtime.retry import hub_is_unknown, is_transient, network_cause, one_line, retrying

log = logging.getLogger(__name__)


class HubSource:
    """Any data set that `datasets` can stream, as text or already tokenised.

    Row i of the split is the document `<split>#i`. After a failure (a lost connection, a truncated
    answer, a server that is silent for HF_HUB_DOWNLOAD_TIMEOUT seconds, 10 by default) reading is
    tried again at the same row, after the pauses of runtime/retry.py. It has also failed if it
    ends before the number of rows that the data set's card names; where the card names none, a
    file that was truncated between two lines is not noticed.

    Args:
        name: on the Hub (`owner/name`), or a local folder: one written by `save_to_disk`, or one
            with parquet, jsonl or other files that `datasets` loads.
        config: subset of the data set; None is its default one.
        split: such as `train`; a folder with a single saved split has only that one.
        revision: branch, tag or commit; with a full commit the Hub is not asked when the corpus
            is already packed.
        column: holds text or lists of token ids; None takes the first of `text`, `content`,
            `tokens`, `input_ids`.
        retries: most tries in a row after a failure.
    """

    def __init__(
        self,
        *,
        name: str,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        column: str | None = None,
        retries: int = 5,
    ) -> None:
        self.name, self.config, self.split = name, config, split
        self.revision, self.column, self.retries = revision, column, retries
        self.promised: int | None = None  # rows of the split, if its card names them

    @property
    def _folder(self) -> Path | None:
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return folder
        if folder.is_file():
            advice = argument("data.path", self.name)
            raise UserError(f"data.name={self.name} is a file: use data=files {advice}")
        if folder.is_absolute() or self.name.startswith((".", "~")):
            raise UserError(
                f"data.name={self.name} is no folder: give a folder that `datasets` can load, or "
                "the name of a data set on the Hub such as owner/name"
            )
        return None

    def check(self) -> None:
        """Check that a local folder exists; the Hub is not asked.

        Raises:
            UserError: it does not.
        """
        _ = self._folder

    def fingerprint(self) -> str:
        """Return a key over name, config, split, column and commit (a folder: its content)."""
        if self._folder is not None:
            paths = (p for p in self._folder.rglob("*") if p.is_file())
            names = ((p.relative_to(self._folder).as_posix(), p) for p in paths)
            content = files_fingerprint(sorted(n for n in names if not n[0].startswith(".")))
            origin = ["folder", content]
        else:
            origin = ["hub", self.name, self._commit() or self.revision or "unknown"]
        key = ["datasets", origin, self.config, self.split, self.column]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def _commit(self) -> str | None:
        """Return the commit of the revision, or None if it is unknown.

        Without network it is the commit in the Hub's local cache, so that a corpus that was packed
        with network is found again without.
        """
        from huggingface_hub import HfApi, try_to_load_from_cache

        if self.revision is not None and len(self.revision) == 40:
            return self.revision
        try:
            if not hub_is_unknown():
                return HfApi().dataset_info(self.name, revision=self.revision, timeout=20).sha
        except Exception as error:
            # Streaming meets the error again and reports it; a packed corpus does not need it.
            log.debug("commit of %s unknown: %s", self.name, error)
        readme = try_to_load_from_cache(
            self.name, "README.md", repo_type="dataset", revision=self.revision
        )
        return Path(readme).parent.name if isinstance(readme, str) else None

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yield the rows from `start` on, in the order of the data set."""
        return legal_text(self._documents(start), f"data.name={self.name}")

    def _documents(self, start: int) -> Iterator[Document]:
        column = None
        for row, record in self._rows(start):
            if column is None:
                column = self._pick(list(record))
            where = f"{self.name}, row {row}"
            yield row_document(f"{self.split}#{row}", record[column], column, where)

    def _pick(self, columns: list[str]) -> str:
        return pick_column(columns, self.column, self.name, "data.column")

    def _rows(self, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        row = start

        def report(state: RetryCallState) -> None:
            error = None if state.outcome is None else state.outcome.exception()
            log.warning(
                "%s: connection lost at row %d (%s); retry %d of %d in %.0f s",
                self.name,
                row,
                error and one_line(error),
                state.attempt_number,
                self.retries,
                state.upcoming_sleep,
            )

        if self._folder is None and hub_is_unknown():
            raise UserError(
                f"data set {self.name}: there is no network, the Hub's name cannot be looked up. "
                "Packed text is kept: with network the same command resumes there. Without, give "
                "files, data=files data.path=<...>, or a local copy, data.name=<folder>."
            )
        try:
            for attempt in retrying(self.retries, self._may_pass, report):
                with attempt, _few_retries_of_their_own(self.retries):
                    for record in self._open(row):
                        yield row, record
                        row += 1
                        attempt.retry_state.attempt_number = 1  # failures in a row are counted
                    if self.promised is not None and row < self.promised:
                        raise ConnectionError(
                            f"it ended after {row:,} of the {self.promised:,} rows that its card "
                            "names"
                        )
        except UserError:
            raise
        except Exception as error:
            raise self._explained(error, row) from error

    def _may_pass(self, error: BaseException) -> bool:
        if self._folder is not None:  # not sent by anybody: a damaged file stays damaged
            return is_transient(error)
        return is_transient(error) or _is_damage(error) or network_cause(error) is not None

    def _explained(self, error: Exception, row: int) -> UserError:
        """Return the error for the user, after all tries."""
        if not self._may_pass(error):
            return UserError(
                f"cannot read data set {self.name}, config {self.config}, split {self.split!r}, "
                f"revision {self.revision}: {one_line(error)}"
            )
        return UserError(
            f"data set {self.name}: reading failed at row {row:,} in {self.retries + 1} tries "
            f"({one_line(error)}). Packed text is kept: the same command resumes there. "
            "data.retries=<number> waits longer. If the data set is damaged there, or its card is "
            "wrong, set stream.max_tokens to less than what comes before."
        )

    def _open(self, start: int) -> Iterable[dict[str, Any]]:
        """Return the rows from `start` on, with the column to read only.

        Other columns are never decoded: an image or a sound would ask for its codec. `skip` reads
        what it skips, but in complete Arrow batches, without making rows of them.
        """
        import datasets

        _read_zst()
        folder = self._folder
        saved_by = ("dataset_dict.json", "state.json")  # of `save_to_disk`
        if folder is None or not any((folder / name).is_file() for name in saved_by):
            place = self.name if folder is None else str(folder)
            stream: datasets.IterableDataset = datasets.load_dataset(
                place, self.config, split=self.split, revision=self.revision, streaming=True
            )
            splits = (folder is None and stream.info.splits) or {}
            self.promised = getattr(splits.get(self.split), "num_examples", None) or None
            if stream.column_names is not None:  # without declared types nothing is decoded
                stream = stream.select_columns([self._pick(stream.column_names)])
            return cast(Iterable[dict[str, Any]], stream.skip(start))
        saved = datasets.load_from_disk(folder)
        if isinstance(saved, datasets.DatasetDict):
            if self.split not in saved:
                raise UserError(
                    f"{self.name} has no split {self.split!r}; it has: {', '.join(saved)}. Choose "
                    "one with data.split=..."
                )
            saved = saved[self.split]
        # A data set also keeps in which format (numpy, torch) its rows come.
        saved = saved.with_format(None).select_columns([self._pick(saved.column_names)])
        rows = saved.select(range(start, len(saved))) if start < len(saved) else []
        return cast(Iterable[dict[str, Any]], rows)


def _is_damage(error: BaseException) -> bool:
    """Return whether an error means that a file is incomplete: a download may have ended early."""
    import zlib

    import pyarrow

    return isinstance(error, pyarrow.ArrowInvalid | EOFError | zlib.error)


def _read_zst() -> None:
    """Let `datasets` read .zst files with pyarrow, if the library that it would use is missing."""
    from fsspec.compression import compr, register_compression

    from groupsae.data.formats import open_zst

    if "zstd" not in compr:
        register_compression("zstd", open_zst, "zst")


@contextmanager
def _few_retries_of_their_own(retries: int) -> Iterator[None]:
    """Let `datasets` give up within minutes.

    It tries a broken read 20 times, each with 23 s of pauses in huggingface_hub below it, and that
    for every try of ours: an hour until the user hears of it. Reading further in the same file is
    cheaper than opening it again, though, so it gets as many tries as ours.
    """
    from datasets import config

    before = config.STREAMING_READ_MAX_RETRIES, config.STREAMING_OPEN_MAX_RETRIES
    config.STREAMING_READ_MAX_RETRIES, config.STREAMING_OPEN_MAX_RETRIES = retries + 1, 1
    try:
        yield
    finally:
        config.STREAMING_READ_MAX_RETRIES, config.STREAMING_OPEN_MAX_RETRIES = before
