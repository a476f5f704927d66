"""Integers about entries: which segment each belongs to."""

import torch
from jaxtyping import Int
from torch import Tensor


def rows_of(starts: Int[Tensor, "bound"], count: int) -> Int[Tensor, "entry"]:
    """Return the segment of each of `count` entries; waits for no device."""
    segments = torch.arange(len(starts) - 1, device=starts.device)
    return segments.repeat_interleave(starts.diff(), output_size=count)
