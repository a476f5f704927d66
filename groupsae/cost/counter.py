"""PyTorch's FLOP counter with the operators of sparse decoding."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from groupsae.runtime.compat import of_tensors, private_flop_formulas


def flop_counter() -> FlopCounterMode:
    """Return a counter of products and attention, for a `with`; `get_total_flops()` reads it.

    A weighted embedding bag and a product that is sampled at the entries of a sparse matrix cost
    2 d FLOPs for every row they touch; PyTorch's own registry lacks both, oneDNN's products and
    the CPU's attention.
    """
    known = private_flop_formulas(
        attention=lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        rows=lambda table, indices, *_, **__: 2 * indices[0] * table[1],
        linear=lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0],
    )
    # of tensors, not of their shapes, which hide the entries
    known[torch.ops.aten.sparse_sampled_addmm] = of_tensors(
        lambda entries, left, *_, **__: 2 * entries.values().numel() * left.shape[1]
    )
    return FlopCounterMode(display=False, custom_mapping=known)
