"""Which layer of a group each token draws: a pure function of seed, group and position."""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014): increment and the two multipliers, as signed int64.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def stream_key(seed: int, layers: list[int]) -> int:
    """Return the signed 64-bit key of one group's stream of draws."""
    digest = hashlib.sha256(f"{seed}:{layers}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def draw_layers(
    positions: Int[Tensor, "token"], layers: list[int], seed: int
) -> Int[Tensor, "token"]:
    """Return the layer that each position draws, uniform over `layers`.

    A counter-based generator (SplitMix64 of the position) instead of a stateful one: the draw
    of a token depends on nothing but (seed, group, global position), so it is the same on one
    process or many, after a resume, and whether or not other groups are trained beside it.

    Args:
        positions: global indices of the tokens in the run, int64.
        layers: the group.
        seed: of the run.
    """
    if len(layers) == 1:
        return torch.full_like(positions, layers[0])
    x = positions * GAMMA + stream_key(seed, layers)
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    x = x ^ _shift_right(x, 31)
    choice = _shift_right(x, 33) % len(layers)  # 31 bits: the bias is below size / 2^31
    return torch.tensor(layers, device=positions.device)[choice]
