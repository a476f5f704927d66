"""Sets of positions as bits: sixty-four positions are compared at once."""

import numpy as np
from jaxtyping import Bool, Int, UInt64


def packed(flags: Bool[np.ndarray, "*sets position"]) -> UInt64[np.ndarray, "*sets word"]:
    """Return which positions belong to each set; those after the last one do not."""
    octets = np.packbits(flags, axis=-1, bitorder="little")
    missing = -octets.shape[-1] % 8
    if missing:
        octets = np.pad(octets, [*[(0, 0)] * (octets.ndim - 1), (0, missing)])
    return octets.view("<u8")


def count(bits: UInt64[np.ndarray, "*sets word"]) -> Int[np.ndarray, "*sets"]:
    """Return the number of positions in each set."""
    return np.asarray(np.bitwise_count(bits).sum(-1, dtype=np.uint32), np.int64)


def contains(
    bits: UInt64[np.ndarray, " word"], positions: Int[np.ndarray, " position"]
) -> Bool[np.ndarray, " position"]:
    """Return which of some positions belong to a set."""
    found: np.ndarray = bits.view(np.uint8)[positions >> 3] >> (positions & 7) & 1
    return found.astype(bool)


def unpacked(bits: UInt64[np.ndarray, " word"], size: int) -> Bool[np.ndarray, " position"]:
    """Return for each of `size` positions whether it belongs to a set."""
    return np.unpackbits(bits.view(np.uint8), count=size, bitorder="little").astype(bool)
