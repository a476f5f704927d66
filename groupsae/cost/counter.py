"""PyTorch's FLOP counter, taught the operators that sparse decoding uses."""

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten


def flop_counter() -> FlopCounterMode:
    """Return a counter of the products and attentions in a `with`; `get_total_flops()` reads it.

    An embedding bag with weights and a product that is sampled at a sparse matrix's entries cost
    2 d FLOPs for every row they touch; PyTorch's own registry has neither, nor oneDNN's products,
    nor the CPU's attention.
    """
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._embedding_bag_forward_only: _rows_of_the_table,
        aten._embedding_bag: _rows_of_the_table,
        aten.sparse_sampled_addmm: _sampled,
    }
    if torch.backends.mkldnn.is_available():
        known[torch.ops.mkldnn._linear_pointwise] = _linear
    return FlopCounterMode(display=False, custom_mapping=known)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(map(int, x)) * int(weight[0])


def _rows_of_the_table(table: Any, indices: Any, *_: Any, **__: Any) -> int:
    return 2 * int(indices[0]) * int(table[1])


def _sampled(entries: Any, left: Any, *_: Any, **__: Any) -> int:
    return 2 * int(entries.values().numel()) * int(left.shape[1])


_sampled._get_raw = True  # type: ignore[attr-defined]  # of the tensors: their shapes hide the entries
