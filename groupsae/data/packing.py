"""Documents to blocks of tokens: split, packed, and cached in a folder that is keyed by content.

Packing is resumable, and safe when two processes want the same text.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from jaxtyping import Int, Int64
from transformers import PreTrainedTokenizerBase

from groupsae.data.sources import Document, Source
from groupsae.files.atomic import explain_write_errors, write_json
from groupsae.files.locks import one_at_a_time
from groupsae.runtime.errors import UserError
from groupsae.runtime.output import screen
from groupsae.runtime.progress import token_progress

FORMAT = 1  # raise it when the layout of the files changes: text is then packed again
FLUSH_TOKENS = 2_000_000  # most tokens that a kill while packing can lose, and that memory holds
BATCH_DOCUMENTS = 64  # tokenised in one call, over all cores unless TOKENIZERS_PARALLELISM=false
BATCH_SIZE = 1_000_000  # characters (or tokens) read ahead at most, not counting the last document

Split = Literal["train", "calibration", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "heldout")


# ---- splits -----------------------------------------------------------------------------------


def split_of(name: str, heldout_fraction: float, calibration_fraction: float) -> Split:
    """Return the split that a document belongs to: fixed by its name, before any shuffle.

    The first 64 bits of SHA-256 of its name give a number u in [0, 1): u < heldout_fraction is
    held out, the next calibration_fraction is for calibration (layer distances, norm factors),
    the rest is trained on. A name never changes sides when other documents come or go, so
    everything that shares a corpus (the language model and its SAEs) shares the held-out set.

    >>> split_of("json/decoder.py", heldout_fraction=0.0, calibration_fraction=0.0)
    'train'
    >>> split_of("json/decoder.py", heldout_fraction=1.0, calibration_fraction=0.0)
    'heldout'
    """
    u = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if u < heldout_fraction:
        return "heldout"
    if u < heldout_fraction + calibration_fraction:
        return "calibration"
    return "train"


def document_numbers(
    blocks: Int[np.ndarray, "block pos"], eos: int | None
) -> Int64[np.ndarray, " block"]:
    """Return a number of the document that each block begins in; blocks in the order of the file.

    Documents end at EOS. Where nothing does (text that came tokenised without it), every block
    counts as one document.

    >>> document_numbers(np.array([[5, 6], [7, 0], [8, 0], [9, 9]]), eos=0).tolist()
    [0, 0, 1, 2]
    """
    ends = (blocks == eos).sum(1) if eos is not None else np.zeros(len(blocks), np.int64)
    return np.cumsum(ends) - ends if ends.any() else np.arange(len(blocks))


# ---- the packed corpus ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become blocks.

    Raises:
        UserError: no text can be packed like that.
    """

    context: int
    heldout_fraction: float
    calibration_fraction: float
    prepend_bos: bool
    max_tokens: int | None  # over all splits; None reads the complete source

    def __post_init__(self) -> None:
        """Check the values."""
        heldout, calibration = self.heldout_fraction, self.calibration_fraction
        if not (0 <= heldout <= 1 and 0 <= calibration <= 1 and heldout + calibration <= 1):
            raise UserError(
                f"stream.heldout_fraction={heldout} and stream.calibration_fraction={calibration} "
                "must lie in [0, 1], and their sum may not exceed 1"
            )
        shortest = 2 if self.prepend_bos else 1
        if self.context < shortest:
            raise UserError(f"a block of {self.context} tokens is too short: at least {shortest}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(
                f"stream.max_tokens={self.max_tokens} must be at least 1, or null to derive it "
                "from tokens"
            )


class TokenBlocks:
    """The three splits of one packed corpus; `blocks[split]` is int32 [num_blocks, context].

    Raises:
        UserError: the files are not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
            self.blocks = {split: self._checked(split) for split in SPLITS}
        except FileNotFoundError as error:
            raise self._damaged(f"{Path(error.filename).name} is missing") from None
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error.strerror or error}") from error
        except (ValueError, KeyError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None

    def _checked(self, split: Split) -> np.ndarray:
        """Return the blocks of a split, after a check of their size and checksum."""
        context = self.manifest["packing"]["context"]
        file = self.folder / f"{split}.bin"
        expected, size = 4 * self.manifest["num_blocks"][split] * context, file.stat().st_size
        if size != expected:
            raise self._damaged(f"{file.name} has {size:,} bytes instead of {expected:,}")
        written = self.manifest.get("checksums")  # earlier versions wrote none
        if written is not None and written.get(split) != checksum(self.folder, split):
            raise self._damaged(f"the checksum of {file.name} is wrong")
        if not expected:
            return np.empty((0, context), np.int32)
        return np.memmap(file, dtype=np.int32, mode="r").reshape(-1, context)

    def _damaged(self, how: str) -> UserError:
        return UserError(
            f"the packed tokens in {self.folder} are damaged ({how}): delete that folder and give "
            "the same command again, which packs the text again"
        )

    @property
    def key(self) -> str:
        """Return the content key of the cache."""
        return str(self.manifest["key"])


def checksum(folder: Path, split: Split) -> str:
    """Return XXH3 (128 bits) of the packed tokens of a split, in hex."""
    with (folder / f"{split}.bin").open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a key over the vocabulary and the tokenizer's rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    return hashlib.sha256(rules.encode()).hexdigest()


def load_token_blocks(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    cache: Path,
    vocab_size: int | None = None,
) -> TokenBlocks:
    """Return the packed corpus, packing it first if this content was never packed.

    Documents are joined by the end-of-text token and split into blocks without padding. A killed
    run resumes from its last flush, an incomplete cache is never read, and of two processes that
    want the same content one packs while the other waits.

    Token ids of the language model end below `vocab_size`; None takes the tokenizer's size
    (Pythia's embedding, 50,304, is padded beyond its tokenizer's 50,277). It is not part of the
    key: it decides whether the blocks can be used, not their content.

    Raises:
        UserError: the source is empty or cannot be read, a split that is asked for has no
            complete block, a token id is outside the vocabulary, or the cache is damaged or
            cannot be written.
    """
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    parts = [FORMAT, source.fingerprint(), tokenizer_fingerprint(tokenizer), vars(packing)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    folder = cache / key
    if not (folder / "manifest.json").exists():
        pack(source, tokenizer, packing, folder, key, vocab_size)
    blocks = TokenBlocks(folder)
    highest = blocks.manifest.get("max_token_id", -1)
    if highest >= vocab_size:
        raise _wrong_tokenizer(f"the packed corpus {folder}", highest, vocab_size)
    _check_filled(blocks, packing)
    return blocks


def _check_filled(blocks: TokenBlocks, packing: Packing) -> None:
    """Raise UserError if a split with a share of the documents has no complete block."""
    manifest = blocks.manifest
    if not manifest["documents"]:
        raise UserError(
            "the text source is empty: it has no document. Give another file, folder or split"
        )
    shares = {"heldout": packing.heldout_fraction, "calibration": packing.calibration_fraction}
    shares["train"] = 1 - sum(shares.values())
    for split in SPLITS:
        if shares[split] < 1e-9 or len(blocks.blocks[split]):
            continue
        tokens, documents = manifest["split_tokens"], manifest["split_documents"]
        way_out = f"Raise stream.{split}_fraction (now {shares[split]}), "
        if split == "train":
            way_out = "Lower stream.heldout_fraction and stream.calibration_fraction, "
        if packing.max_tokens is not None:
            way_out += f"raise stream.max_tokens (now {packing.max_tokens:,}), "
        raise UserError(
            f"the {split} split has no complete block of {packing.context} tokens: of "
            f"{manifest['documents']:,} document(s) with {sum(tokens.values()):,} tokens it got "
            f"{documents[split]:,} with {tokens[split]:,}. {way_out}lower stream.context or give "
            "more text."
        )


def _wrong_tokenizer(what: str, token_id: int, vocab_size: int) -> UserError:
    return UserError(
        f"{what} holds the token id {token_id}, while the model's vocabulary ends at "
        f"{vocab_size - 1}: it was tokenised with another tokenizer. Use the model that it was "
        "made for, or a data set (or column) with text"
    )


# ---- packing ----------------------------------------------------------------------------------


def pack(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    folder: Path,
    key: str,
    vocab_size: int,
) -> None:
    """Write the blocks of a corpus into `folder`, unless another process just did.

    Everything goes into `<folder>.partial`, which is renamed only when it is complete.

    Raises:
        UserError: the folder cannot be written, a token id is outside the vocabulary, or the
            source cannot be read further; what was packed until then is kept.
    """
    with one_at_a_time(folder.with_suffix(".lock"), "packing this text"):
        if (folder / "manifest.json").exists():
            return
        partial = folder.with_suffix(".partial")
        bos = _begin_of_text(tokenizer) if packing.prepend_bos else None
        writer = BlockWriter(partial, packing.context, bos, vocab_size)
        before, began = writer.num_tokens, time.monotonic()
        try:
            _fill(writer, source, tokenizer, packing)
        except UserError:
            writer.flush()
            raise
        writer.flush()
        with explain_write_errors(partial):
            manifest = {"key": key, "packing": vars(packing), **writer.summary()}
            manifest["checksums"] = {split: checksum(partial, split) for split in SPLITS}
            write_json(partial / "manifest.json", manifest)
            writer.note.unlink()
            if folder.exists():  # without a manifest: not ours, and of no use to anybody
                shutil.rmtree(folder)
            partial.rename(folder)
        seconds = max(time.monotonic() - began, 1e-3)
        screen(stderr=True).print(
            f"packed {writer.num_tokens:,} tokens of {writer.num_documents:,} documents into "
            f"{folder} ({(writer.num_tokens - before) / seconds:,.0f} tokens/s)",
            highlight=False,
            soft_wrap=True,
        )


class BlockWriter:
    """Token blocks of the three splits, growing in a folder.

    At every flush the files are brought to disk first, then a note of how much of them counts;
    a writer that opens the folder later continues there and overwrites the data after that. Tokens
    that do not fill a block are kept in the note.
    """

    def __init__(self, folder: Path, context: int, bos: int | None, vocab_size: int) -> None:
        self.folder, self.context, self.bos, self.vocab_size = folder, context, bos, vocab_size
        self.note = folder / "progress.json"
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.state = self._opened()
        self.pending: dict[Split, list[np.ndarray]] = {
            split: [np.asarray(self.state["rest"][split], dtype=np.int32)] for split in SPLITS
        }
        self.waiting = 0

    def _file(self, split: Split) -> Path:
        return self.folder / f"{split}.bin"

    def _opened(self) -> dict[str, Any]:
        """Return the note, if the files contain at least as much as it counts; or begin again."""
        empty: dict[str, Any] = {
            "documents": dict.fromkeys(SPLITS, 0),
            "tokens": dict.fromkeys(SPLITS, 0),
            "written": dict.fromkeys(SPLITS, 0),
            "rest": {split: [] for split in SPLITS},
            "max_token_id": -1,
        }
        try:
            state: dict[str, Any] = json.loads(self.note.read_text())
            sizes = {split: self._file(split).stat().st_size for split in SPLITS}
            if state.keys() == empty.keys() and all(
                sizes[split] >= 4 * state["written"][split] for split in SPLITS
            ):
                return state
        except (FileNotFoundError, ValueError):
            pass
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for split in SPLITS:
            self._file(split).touch()
        return empty

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
                bad = high if low >= 0 else low
                raise _wrong_tokenizer(f"document {name!r}", bad, self.vocab_size)
            self.state["max_token_id"] = max(self.state["max_token_id"], high)
        self.pending[split].append(ids.astype(np.int32))
        self.state["documents"][split] += 1
        self.state["tokens"][split] += ids.size
        self.waiting += ids.size
        if self.waiting > FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Bring complete blocks to disk, then the note that they are there."""
        body = self.context - (self.bos is not None)
        with explain_write_errors(self.folder):
            for split in SPLITS:
                tokens = np.concatenate(self.pending[split])
                complete = len(tokens) // body * body
                blocks = tokens[:complete].reshape(-1, body)
                if self.bos is not None:
                    blocks = np.insert(blocks, 0, self.bos, axis=1)
                with self._file(split).open("r+b") as handle:
                    # Not simply at the end: a flush that broke off (disk full) left something.
                    handle.seek(4 * self.state["written"][split])
                    handle.truncate()
                    handle.write(blocks.tobytes())
                    handle.flush()
                    os.fsync(handle.fileno())
                self.pending[split] = [tokens[complete:]]
                self.state["written"][split] += blocks.size
                self.state["rest"][split] = tokens[complete:].tolist()
            write_json(self.note, self.state)
        self.waiting = 0

    def summary(self) -> dict[str, Any]:
        """Return the manifest's entries about the content."""
        return {
            "documents": self.num_documents,
            "num_blocks": {s: self.state["written"][s] // self.context for s in SPLITS},
            "split_documents": self.state["documents"],
            "split_tokens": self.state["tokens"],
            "max_token_id": self.state["max_token_id"],
        }


def _begin_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        bos = tokenizer.cls_token_id  # BERT's name for it
    if bos is None:
        raise UserError("stream.prepend_bos=true, but the tokenizer has no BOS token: use false")
    return bos


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that closes a document: EOS, or SEP without an EOS (BERT)."""
    eos: int | None = tokenizer.eos_token_id
    return tokenizer.sep_token_id if eos is None else eos


def _fill(
    writer: BlockWriter, source: Source, tokenizer: PreTrainedTokenizerBase, packing: Packing
) -> None:
    """Add documents from the first that is not in the writer, until the source or budget ends."""
    budget = packing.max_tokens
    if budget is not None and writer.num_tokens >= budget:
        return
    with token_progress("packing", budget, done=writer.num_tokens, stderr=True) as advance:
        for batch in batches(source.documents(writer.num_documents)):
            before = writer.num_tokens
            for document, ids in zip(batch, token_ids(batch, tokenizer), strict=True):
                split = split_of(
                    document.name, packing.heldout_fraction, packing.calibration_fraction
                )
                left = None if budget is None else budget - writer.num_tokens
                writer.add(split, document.name, ids[:left])
                if budget is not None and writer.num_tokens >= budget:
                    return
            advance(writer.num_tokens - before)


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents by the handful: bounded in number and, without the last one, in size."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text or document.token_ids or ())
        if len(batch) == BATCH_DOCUMENTS or size > BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_ids(batch: list[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the token ids of each document.

    A text is closed by the end-of-text token; tokenised documents are not changed.
    """
    texts = [d.text or "" for d in batch if d.token_ids is None]
    encoded = iter(_encode(texts, tokenizer) if texts else [])
    end = [] if (token := end_of_text(tokenizer)) is None else [token]
    for document in batch:
        if document.token_ids is None:
            yield next(encoded) + end
        else:
            yield document.token_ids


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of each text, of any length and without special tokens around them.

    The backend is called directly, as `encode_batch_fast` leaves out the character offsets that
    nobody reads here: 1.2 to 1.5 times as many tokens a second of one thread as `tokenizer(text)`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids
    backend.no_truncation()
    backend.no_padding()
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
