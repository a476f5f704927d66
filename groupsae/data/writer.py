"""Appends tokens to one file of blocks per split, and remembers how far it came."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from groupsae.data.splits import SPLITS, Split
from groupsae.files.atomic import explain_write_errors, write_json
from groupsae.runtime.errors import UserError

FLUSH_TOKENS = 2_000_000  # what a kill in the middle of packing can cost, and what memory holds


class BlockWriter:
    """Token blocks of the three splits, growing in a folder.

    At every flush the files are brought to disk first, then a note of how much of them counts;
    a writer that opens the folder later goes on there and writes over what lies behind. What
    does not fill a block waits in the note.

    Args:
        folder: is made if missing.
        context: tokens in a block, BOS included.
        bos: token that starts every block, or None.
        vocab_size: every token id must be below.
    """

    def __init__(self, folder: Path, context: int, bos: int | None, vocab_size: int) -> None:
        self.folder, self.context, self.bos, self.vocab_size = folder, context, bos, vocab_size
        self.note = folder / "progress.json"
        self.state: dict[str, Any] = {
            "documents": dict.fromkeys(SPLITS, 0),
            "tokens": dict.fromkeys(SPLITS, 0),
            "written": dict.fromkeys(SPLITS, 0),
            "rest": {split: [] for split in SPLITS},
            "max_token_id": -1,
        }
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._go_on_or_start_anew()
            for split in SPLITS:
                self._file(split).touch()
        self.pending: dict[Split, list[np.ndarray]] = {
            split: [np.asarray(self.state["rest"][split], dtype=np.int32)] for split in SPLITS
        }
        self.waiting = 0

    def _file(self, split: Split) -> Path:
        return self.folder / f"{split}.bin"

    def _go_on_or_start_anew(self) -> None:
        """Take over the note, if it is whole and the files hold at least what it says."""
        try:
            state = json.loads(self.note.read_text())
            sizes = {split: self._file(split).stat().st_size for split in SPLITS}
            if state.keys() == self.state.keys() and all(
                sizes[split] >= 4 * state["written"][split] for split in SPLITS
            ):
                self.state = state
                return
        except (FileNotFoundError, ValueError):
            pass
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    @property
    def num_documents(self) -> int:
        """Return how many documents were added, those of an earlier writer included."""
        return sum(self.state["documents"].values())

    @property
    def num_tokens(self) -> int:
        """Return how many tokens were added, without BOS."""
        return sum(self.state["tokens"].values())

    def add(self, split: Split, name: str, token_ids: list[int]) -> None:
        """Append one document.

        Raises:
            UserError: a token id is outside the vocabulary.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        if ids.size:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                raise UserError(
                    wrong_tokenizer(
                        f"document {name!r}", high if low >= 0 else low, self.vocab_size
                    )
                )
            self.state["max_token_id"] = max(self.state["max_token_id"], high)
        self.pending[split].append(ids.astype(np.int32))
        self.state["documents"][split] += 1
        self.state["tokens"][split] += ids.size
        self.waiting += ids.size
        if self.waiting > FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Bring whole blocks to disk, then the note that they are there."""
        body = self.context - (self.bos is not None)
        with explain_write_errors(self.folder):
            for split in SPLITS:
                tokens = np.concatenate(self.pending[split])
                whole = len(tokens) // body * body
                blocks = tokens[:whole].reshape(-1, body)
                if self.bos is not None:
                    blocks = np.insert(blocks, 0, self.bos, axis=1)
                with self._file(split).open("r+b") as handle:
                    # Not simply at the end: a flush that broke off (disk full) left something.
                    handle.seek(4 * self.state["written"][split])
                    handle.truncate()
                    handle.write(blocks.tobytes())
                    handle.flush()
                    os.fsync(handle.fileno())
                self.pending[split] = [tokens[whole:]]
                self.state["written"][split] += blocks.size
                self.state["rest"][split] = tokens[whole:].tolist()
            write_json(self.note, self.state)
        self.waiting = 0

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says about the content."""
        return {
            "documents": self.num_documents,
            "num_blocks": {s: self.state["written"][s] // self.context for s in SPLITS},
            "split_documents": self.state["documents"],
            "split_tokens": self.state["tokens"],
            "max_token_id": self.state["max_token_id"],
        }


def checksum(folder: Path, split: Split) -> str:
    """Return XXH3 (128 bits) of the packed tokens of a split, in hex."""
    with (folder / f"{split}.bin").open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def wrong_tokenizer(what: str, token_id: int, vocab_size: int) -> str:
    """Return the sentence about tokens that the vocabulary does not have."""
    return (
        f"{what} holds the token id {token_id}, while the model's vocabulary ends at "
        f"{vocab_size - 1}: it was tokenised with another tokenizer. Take the model it was made "
        "for, or a data set (or column) with text"
    )
