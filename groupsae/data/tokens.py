"""Packed token blocks in a memory-mapped cache that is keyed by content."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from groupsae.data.packing import Packing, pack
from groupsae.data.sources import Source
from groupsae.data.splits import SPLITS, Split
from groupsae.data.writer import checksum, wrong_tokenizer
from groupsae.files.atomic import write_json
from groupsae.runtime.errors import UserError

__all__ = ["Packing", "TokenBlocks", "load_token_blocks", "tokenizer_fingerprint", "write_json"]

FORMAT = 1  # raise it when the layout of the files changes: old caches are then built anew


class TokenBlocks:
    """The three splits of one packed corpus; `blocks[split]` is int32 [num_blocks, context].

    Raises:
        UserError: the files are not what the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blocks: dict[Split, np.ndarray] = {}
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
            for split in SPLITS:
                self.blocks[split] = self._checked(split)
        except FileNotFoundError as error:
            raise self._damaged(f"{Path(error.filename).name} is missing") from None
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error.strerror or error}") from error
        except (ValueError, KeyError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None

    def _checked(self, split: Split) -> np.ndarray:
        """Return the blocks of a split, after a look at their size and checksum."""
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
            f"the packed tokens in {self.folder} are damaged ({how}): delete that folder and run "
            "the command again, it is then packed anew"
        )

    @property
    def key(self) -> str:
        """Return the content key of the cache."""
        return str(self.manifest["key"])


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
    """Return the packed corpus, building it first if this content was never packed.

    Documents are joined by the end-of-text token and cut into blocks without padding. A killed
    run goes on from its last flush, half a cache is never read, and of two processes that want
    the same content one packs while the other waits.

    Args:
        source: the documents.
        tokenizer: for documents that are text, and for BOS.
        packing: how documents become blocks.
        cache: folder of all packed corpora.
        vocab_size: token ids of the language model end below; None takes the tokenizer's size
            (Pythia's embedding, 50,304, is padded beyond its tokenizer's 50,277). Not part of
            the key: it decides whether the blocks can be used, not what is in them.

    Raises:
        UserError: the source is empty or cannot be read, a split that is asked for has no whole
            block, a token id is outside the vocabulary, or the cache is damaged or cannot be
            written.
    """
    check_packing(packing)
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    parts = [FORMAT, source.fingerprint(), tokenizer_fingerprint(tokenizer), vars(packing)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    folder = cache / key
    if not (folder / "manifest.json").exists():
        pack(source, tokenizer, packing, folder, key, vocab_size)
    blocks = TokenBlocks(folder)
    highest = blocks.manifest.get("max_token_id", -1)
    if highest >= vocab_size:
        raise UserError(wrong_tokenizer(f"the packed corpus {folder}", highest, vocab_size))
    check_filled(blocks, packing)
    return blocks


def check_packing(packing: Packing) -> None:
    """Raise UserError if the blocks asked for cannot be made from any text."""
    heldout, calibration = packing.heldout_fraction, packing.calibration_fraction
    if not (0 <= heldout <= 1 and 0 <= calibration <= 1 and heldout + calibration <= 1):
        raise UserError(
            f"stream.heldout_fraction={heldout} and stream.calibration_fraction={calibration} "
            "must lie in [0, 1] and leave something to train on: their sum may not exceed 1"
        )
    shortest = 2 if packing.prepend_bos else 1
    if packing.context < shortest:
        raise UserError(f"a block of {packing.context} tokens is too short: at least {shortest}")
    if packing.max_tokens is not None and packing.max_tokens < 1:
        raise UserError(
            f"stream.max_tokens={packing.max_tokens} must be at least 1, or null for what it takes"
        )


def check_filled(blocks: TokenBlocks, packing: Packing) -> None:
    """Raise UserError if a split with a share of the documents has no whole block."""
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
        way_out = f"raise stream.{split}_fraction (now {shares[split]}), "
        if split == "train":
            way_out = "lower stream.heldout_fraction and stream.calibration_fraction, "
        if packing.max_tokens is not None:
            way_out += f"raise stream.max_tokens (now {packing.max_tokens:,}), "
        raise UserError(
            f"the {split} split has not one whole block of {packing.context} tokens: of "
            f"{manifest['documents']:,} document(s) with {sum(tokens.values()):,} tokens it got "
            f"{documents[split]:,} with {tokens[split]:,}. To mend it {way_out}shorten the "
            "context or give more text."
        )
