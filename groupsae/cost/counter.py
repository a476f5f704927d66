"""PyTorch's FLOP counter with the operators of sparse decoding."""

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from groupsae.runtime.compat import of_tensors, private_flop_formulas


def flop_counter() -> FlopCounterMode:
    """Return a counter of products and attention, for a `with`; `get_total_flops()` reads it.

    A weighted embedding bag and a product that is sampled at the entries of a sparse matrix cost
    2 d FLOPs for every row they touch; PyTorch's own registry lacks both, oneDNN's products and
    the CPU's attention.
    """
    known = private_flop_formulas(attention=_attention, rows=_rows_of_the_table, linear=_linear)
    known[torch.ops.aten.sparse_sampled_addmm] = of_tensors(_sampled)  # shapes hide the entries
    return FlopCounterMode(display=False, custom_mapping=known)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(map(int, x)) * int(weight[0])


def _rows_of_the_table(table: Any, indices: Any, *_: Any, **__: Any) -> int:
    return 2 * int(indices[0]) * int(table[1])


def _sampled(entries: Any, left: Any, *_: Any, **__: Any) -> int:
    return 2 * int(entries.values().numel()) * int(left.shape[1])
