"""Documents to token blocks on disk: resumable, and safe when two processes want the same."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from groupsae.data.sources import Document, Source
from groupsae.data.splits import SPLITS, split_of
from groupsae.data.writer import BlockWriter, checksum
from groupsae.files.atomic import explain_write_errors, write_json
from groupsae.files.locks import one_at_a_time
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import ProgressLines

BATCH_DOCUMENTS = 64  # tokenised in one call, over all cores unless TOKENIZERS_PARALLELISM=false
BATCH_SIZE = 1_000_000  # characters (or tokens) read ahead at most, beside the last document


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


def pack(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    folder: Path,
    key: str,
    vocab_size: int,
) -> None:
    """Write the blocks of a corpus into `folder`, unless another process just did.

    Everything goes into `<folder>.partial`, which is renamed only when whole.

    Raises:
        UserError: the folder cannot be written, a token id is outside the vocabulary, or the
            source cannot be read further; what was packed until then is kept.
    """
    console = Console(stderr=True)
    lock = folder.with_suffix(".lock")
    with one_at_a_time(lock, "packing this text"):
        if (folder / "manifest.json").exists():
            return
        partial = folder.with_suffix(".partial")
        bos = _bos(tokenizer) if packing.prepend_bos else None
        writer = BlockWriter(partial, packing.context, bos, vocab_size)
        before, began = writer.num_tokens, time.monotonic()
        try:
            with _bar(console, packing.max_tokens, before) as show:
                _fill(writer, source, tokenizer, packing, show)
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
        console.print(
            f"packed {writer.num_tokens:,} tokens of {writer.num_documents:,} documents into "
            f"{folder} ({(writer.num_tokens - before) / seconds:,.0f} tokens/s)",
            highlight=False,
            soft_wrap=True,
        )


def _bos(tokenizer: PreTrainedTokenizerBase) -> int:
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        bos = tokenizer.cls_token_id  # BERT's name for it
    if bos is None:
        raise UserError("stream.prepend_bos=true, but the tokenizer has no BOS token: use false")
    return bos


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that closes a document: EOS, or SEP where there is none (BERT)."""
    eos: int | None = tokenizer.eos_token_id
    return tokenizer.sep_token_id if eos is None else eos


def _fill(
    writer: BlockWriter,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    show: "Show",
) -> None:
    """Go on with the first document that is not in the writer, until the source or budget ends."""
    budget = packing.max_tokens
    if budget is not None and writer.num_tokens >= budget:
        return
    start = writer.num_documents
    documents = source.documents(start) if start else source.documents()
    for batch in batches(documents):
        for document, ids in zip(batch, token_ids(batch, tokenizer), strict=True):
            split = split_of(document.name, packing.heldout_fraction, packing.calibration_fraction)
            writer.add(
                split, document.name, ids if budget is None else ids[: budget - writer.num_tokens]
            )
            if budget is not None and writer.num_tokens >= budget:
                return
        show(writer)


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents by the handful: bounded in number and, beside the last one, in size."""
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

    A text is closed by the end-of-text token; documents that come tokenised stay as they are.
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


class Show:
    """The progress bar: called after each batch of documents, it shows where the writer is."""

    def __init__(self, progress: Progress, total: int | None, before: int) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=total, completed=before, state="")
        self.lines = ProgressLines("packing", total, before, sys.stderr)

    def __call__(self, writer: BlockWriter) -> None:
        """Show how far the writer is."""
        rate = self.lines.rate(writer.num_tokens)
        state = (
            f"{writer.num_tokens:,} tokens of {writer.num_documents:,} documents, "
            f"{rate:,.0f} tokens/s"
        )
        self.progress.update(self.task, completed=writer.num_tokens, state=state)
        self.lines.update(writer.num_tokens)


@contextmanager
def _bar(console: Console, total: int | None, before: int) -> Iterator[Show]:
    columns = [
        TextColumn("packing"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    ]
    if total is not None:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield Show(progress, total, before)
