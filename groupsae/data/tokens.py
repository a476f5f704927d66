"""Packed token blocks in a memory-mapped cache that is keyed by content."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from groupsae.data.sources import Document, Source
from groupsae.data.splits import SPLITS, Split, split_of

FORMAT = 1  # raise it when the layout of the files changes: old caches are then built anew
FLUSH_TOKENS = 2_000_000  # what a kill in the middle of packing can cost


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become blocks.

    Args:
        context: tokens in a block.
        heldout_fraction: share of the documents that is only ever evaluated on.
        calibration_fraction: share used for layer distances and norm factors only.
        prepend_bos: start every block with the BOS token (the paper does not).
        max_tokens: stop after so many tokens over all splits; None reads the whole source.
    """

    context: int
    heldout_fraction: float
    calibration_fraction: float
    prepend_bos: bool
    max_tokens: int | None


class TokenBlocks:
    """The three splits of one packed corpus; `blocks[split]` is int32 [num_blocks, context]."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        context = self.manifest["packing"]["context"]
        self.blocks: dict[Split, np.ndarray] = {}
        for split in SPLITS:
            tokens = np.memmap(folder / f"{split}.bin", dtype=np.int32, mode="r") if (
                self.manifest["num_blocks"][split]) else np.empty(0, np.int32)
            self.blocks[split] = tokens.reshape(-1, context)

    @property
    def key(self) -> str:
        """Return the content key of the cache."""
        return str(self.manifest["key"])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a key over the vocabulary and the tokenizer's rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(
        tokenizer.get_vocab().items()))
    return hashlib.sha256(rules.encode()).hexdigest()


def load_token_blocks(
    source: Source, tokenizer: PreTrainedTokenizerBase, packing: Packing, cache: Path
) -> TokenBlocks:
    """Return the packed corpus, building it first if this content was never packed.

    Documents are joined by the end-of-text token and cut into blocks without padding. The cache
    is written into `<key>.partial`, flushed together with a note of how far it is, and renamed
    only when whole: a killed run goes on from the last flush, and half a cache is never read.
    """
    key = hashlib.sha256(json.dumps([
        FORMAT, source.fingerprint(), tokenizer_fingerprint(tokenizer), vars(packing)
    ]).encode()).hexdigest()[:16]
    folder = cache / key
    if not (folder / "manifest.json").exists():
        _pack(source, tokenizer, packing, folder, key)
    return TokenBlocks(folder)


class _Writer:
    """Appends tokens to one file per split and remembers how far it came."""

    def __init__(self, folder: Path, context: int, bos: list[int]) -> None:
        self.folder, self.context, self.bos = folder, context, bos
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "progress.json"
        self.done = json.loads(note.read_text()) if note.exists() else {
            "documents": 0, "tokens": dict.fromkeys(SPLITS, 0), "rest": {s: [] for s in SPLITS}}
        self.pending: dict[Split, list[int]] = {s: list(self.done["rest"][s]) for s in SPLITS}
        for split in SPLITS:  # cut off what was written after the last note
            with (folder / f"{split}.bin").open("ab") as handle:
                handle.truncate(4 * self.done["tokens"][split])

    def add(self, split: Split, token_ids: list[int]) -> None:
        self.pending[split].extend(token_ids)

    def waiting(self) -> int:
        return sum(map(len, self.pending.values()))

    def flush(self, documents: int) -> None:
        body = self.context - len(self.bos)
        for split in SPLITS:
            whole = len(self.pending[split]) // body * body
            blocks = np.asarray(self.pending[split][:whole], dtype=np.int32).reshape(-1, body)
            if self.bos:
                start = np.full((len(blocks), 1), self.bos[0], dtype=np.int32)
                blocks = np.concatenate([start, blocks], axis=1)
            with (self.folder / f"{split}.bin").open("ab") as handle:
                handle.write(blocks.tobytes())
                handle.flush()
                os.fsync(handle.fileno())
            self.pending[split] = self.pending[split][whole:]
            self.done["tokens"][split] += blocks.size
        self.done.update(documents=documents, rest=self.pending)
        write_json(self.folder / "progress.json", self.done)


def _pack(
    source: Source, tokenizer: PreTrainedTokenizerBase, packing: Packing, folder: Path, key: str
) -> None:
    partial = folder.with_suffix(".partial")
    bos = [tokenizer.bos_token_id] if packing.prepend_bos else []
    writer = _Writer(partial, packing.context, bos)
    budget = packing.max_tokens or float("inf")
    total = sum(writer.done["tokens"].values())
    documents = 0
    columns = (TextColumn("packing tokens"), BarColumn(), TextColumn("{task.fields[state]}"),
               TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=packing.max_tokens, state="")
        for document in source.documents():
            documents += 1
            if documents <= writer.done["documents"]:
                continue
            ids = _token_ids(document, tokenizer)
            writer.add(split_of(document.name, packing.heldout_fraction,
                                packing.calibration_fraction), ids)
            total += len(ids)
            if writer.waiting() > FLUSH_TOKENS:
                writer.flush(documents)
            if documents % 50 == 0:
                progress.update(task, completed=total,
                                state=f"{documents:,} documents, {total:,} tokens")
            if total >= budget:
                break
    writer.flush(documents)
    num_blocks = {s: writer.done["tokens"][s] // packing.context for s in SPLITS}
    write_json(partial / "manifest.json", {
        "key": key, "packing": vars(packing), "documents": documents, "num_blocks": num_blocks})
    (partial / "progress.json").unlink()
    if folder.exists():  # another process finished the same content first
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def _token_ids(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if document.token_ids is not None:
        return document.token_ids
    ids: list[int] = tokenizer(
        document.text, add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    end = tokenizer.eos_token_id
    return ids if end is None else [*ids, end]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1))
    os.replace(beside, path)
