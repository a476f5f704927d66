"""Documents streamed from a Hugging Face data set, on the Hub or in a local folder."""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from groupsae.data.columns import pick_column, row_document
from groupsae.data.sources import Document, files_fingerprint
from groupsae.errors import UserError

log = logging.getLogger(__name__)
NETWORK_LIBRARIES = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
LONGEST_PAUSE = 60.0  # seconds
WORTH_RETRYING = {408, 425, 429}  # of the 4xx answers; the others say that asking again is useless


class HubSource:
    """Any data set that `datasets` can stream, as text or already tokenised.

    Row i of the split is the document `<split>#i`. Lost connections are tried again at the row
    where they broke, after 1, 2, 4, ... seconds (at most a minute).

    Args:
        name: on the Hub (`owner/name`), or a local folder: one written by `save_to_disk`, or one
            with parquet, jsonl or other files that `datasets` loads.
        config: subset of the data set; None is its default one.
        split: for example `train`; a folder with a single saved split has only that one.
        revision: branch, tag or commit; with a full commit nothing is asked of the Hub when the
            corpus is already packed.
        column: holds text or lists of token ids; None takes the first of `text`, `content`,
            `tokens`, `input_ids`.
        retries: how often in a row a lost connection is tried again.
    """

    def __init__(
        self,
        *,
        name: str,
        config: str | None,
        split: str,
        revision: str | None,
        column: str | None,
        retries: int,
    ) -> None:
        self.name, self.config, self.split = name, config, split
        self.revision, self.column, self.retries = revision, column, retries

    @property
    def _folder(self) -> Path | None:
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return folder
        if folder.is_absolute() or self.name.startswith((".", "~")):
            raise UserError(
                f"data.name={self.name} is no folder: give a folder that `datasets` can load, or "
                "the name of a data set on the Hub such as owner/name"
            )
        return None

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
        """Return the commit that the revision stands for, or None if nobody can tell.

        Without network the answer is what the Hub's local cache remembers of the last time, so
        that a corpus packed on a machine with network is found again without.
        """
        from huggingface_hub import HfApi, try_to_load_from_cache

        if self.revision is not None and len(self.revision) == 40:
            return self.revision
        try:
            info = HfApi().dataset_info(self.name, revision=self.revision, timeout=20)
            return info.sha
        except Exception as error:
            # Whatever it is, streaming meets it again and reports it; a packed corpus does not.
            log.debug("commit of %s unknown: %s", self.name, error)
        readme = try_to_load_from_cache(
            self.name, "README.md", repo_type="dataset", revision=self.revision
        )
        return Path(readme).parent.name if isinstance(readme, str) else None

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yield the rows from `start` on, in the order of the data set."""
        column = None
        for row, record in self._rows(start):
            if column is None:
                column = pick_column(list(record), self.column, self.name, "data.column")
            where = f"{self.name}, row {row}"
            yield row_document(f"{self.split}#{row}", record[column], column, where)

    def _rows(self, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        row, failures = start, 0
        while True:
            try:
                for record in self._open(row):
                    yield row, record
                    row, failures = row + 1, 0
                return
            except UserError:
                raise
            except Exception as error:
                if not is_transient(error):
                    raise self._hopeless(error) from error
                failures += 1
                if failures > self.retries:
                    raise UserError(
                        f"data set {self.name}: the connection was lost at row {row} and not "
                        f"regained in {self.retries} retries ({first_line(error)}). What was "
                        "packed is kept: running the command again goes on where it stopped"
                    ) from error
                pause = min(LONGEST_PAUSE, 2.0 ** (failures - 1))
                log.warning(
                    "%s: connection lost at row %d (%s); retry %d of %d in %.0f s",
                    self.name,
                    row,
                    first_line(error),
                    failures,
                    self.retries,
                    pause,
                )
                time.sleep(pause)

    def _open(self, start: int) -> Iterable[dict[str, Any]]:
        """Return the rows from `start` on.

        `skip` reads over what it skips, but in whole Arrow batches, without making rows of them.
        """
        import datasets

        folder = self._folder
        if folder is None or not _saved_to_disk(folder):
            place = self.name if folder is None else str(folder)
            stream: datasets.IterableDataset = datasets.load_dataset(
                place, self.config, split=self.split, revision=self.revision, streaming=True
            )
            return cast(Iterable[dict[str, Any]], stream.skip(start))
        saved = datasets.load_from_disk(folder)
        if isinstance(saved, datasets.DatasetDict):
            if self.split not in saved:
                raise UserError(
                    f"{self.name} has no split {self.split!r}; it has: {', '.join(saved)}. Choose "
                    "one with data.split=..."
                )
            saved = saved[self.split]
        rows = saved.select(range(start, len(saved))) if start < len(saved) else []
        return cast(Iterable[dict[str, Any]], rows)

    def _hopeless(self, error: Exception) -> UserError:
        config = "" if self.config is None else f", config {self.config!r}"
        revision = "" if self.revision is None else f", revision {self.revision!r}"
        return UserError(
            f"cannot read data set {self.name}{config}, split {self.split!r}{revision}: "
            f"{first_line(error)}"
        )


def is_transient(error: BaseException) -> bool:
    """Return whether an error comes from the network and may be gone at the next try."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    status = getattr(error, "status", None) if status is None else status  # aiohttp's name
    if isinstance(status, int) and 400 <= status < 500:
        return status in WORTH_RETRYING
    lasting = FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return not isinstance(error, lasting) and (
        isinstance(error, OSError | TimeoutError) or bool(libraries & NETWORK_LIBRARIES)
    )


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
