"""Which documents are trained, calibrated and evaluated on: fixed by name, before any shuffle."""

import hashlib
from typing import Literal

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
