"""PyTorch's FLOP counter, taught the operators that sparse decoding uses."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten


def flop_counter() -> FlopCounterMode:
    """Return a counter of the products and attentions in a `with`; `get_total_flops()` reads it.

    An embedding bag with weights, its gradient for the rows and that for the weights cost 2 d
    FLOPs for every row they touch; PyTorch's own registry has none of the three, nor the CPU's
    attention.
    """
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._embedding_bag: _rows_of_the_weight,
            aten._embedding_bag_backward: _rows_of_the_gradient,
            aten._embedding_bag_per_sample_weights_backward: _rows_of_both,
        },
    )


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _rows_of_the_weight(weight: Any, indices: Any, *_: Any, **__: Any) -> int:
    return 2 * int(indices[0]) * int(weight[1])


def _rows_of_the_gradient(gradient: Any, indices: Any, *_: Any, **__: Any) -> int:
    return 2 * int(indices[0]) * int(gradient[1])


def _rows_of_both(gradient: Any, _weight: Any, indices: Any, *_: Any, **__: Any) -> int:
    return 2 * int(indices[0]) * int(gradient[1])
