"""Attention masks that are all ones, without looking at them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


@contextmanager
def nothing_padded() -> Iterator[None]:
    """Tell transformers, in this whole process, that every position is attended to, while inside.

    It drops a mask of ones, so that attention runs its causal (or full) kernel instead of the
    slower one with a mask, but to see that it is one it adds it up on the device and waits for
    the sum: in every forward, for all that was queued before. Here the function that makes masks
    is told that there is no padding. Without a mask at all it would compare positions instead,
    and wait for that; and some models would look for padding tokens.
    """
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    before = dict(masks)
    for name, make in before.items():
        masks[name] = partial(_unpadded, make)
    try:
        yield
    finally:
        for name, make in before.items():
            del masks[name]  # ours; what others registered shows again, unless it was laid over
            if masks.get(name) is not make:
                masks[name] = make


def _unpadded(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return make(*args, **{**kwargs, "attention_mask": None})
