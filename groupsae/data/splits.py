"""Which documents are trained, calibrated and evaluated on: fixed by name, before any shuffle."""

import hashlib
from typing import Literal

import numpy as np
from jaxtyping import Int, Int64

Split = Literal["train", "calibration", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "heldout")


def split_of(name: str, heldout_fraction: float, calibration_fraction: float) -> Split:
    """Return the split that a document belongs to.

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
    counts as a document of its own.

    >>> document_numbers(np.array([[5, 6], [7, 0], [8, 0], [9, 9]]), eos=0).tolist()
    [0, 0, 1, 2]
    """
    ends = (blocks == eos).sum(1) if eos is not None else np.zeros(len(blocks), np.int64)
    return np.cumsum(ends) - ends if ends.any() else np.arange(len(blocks))
