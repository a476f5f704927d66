"""Fails where the host would wait for a GPU: on operators whose outcome the host must know."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# values that Python reads, and results whose size depends on values
OPERATORS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "bincount", "masked_select",
        "_unique2", "unique_dim", "unique_consecutive",
    )
}  # fmt: skip
INDEXED = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
READS = {
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item,
    torch.tensor, torch.as_tensor, torch.distributed.barrier,
}  # fmt: skip  # numbers of Python come from memory that is not pinned


allowed = 0  # how many `waiting` are entered


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if allowed:
            return func(*args, **(kwargs or {}))
        masks = func.name() in INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        unsized = func.name() == "aten::repeat_interleave.Tensor" and not (kwargs or {}).get(
            "output_size"
        )
        if masks or unsized or func.name() in OPERATORS:
            raise AssertionError(f"the host waits in {func.name()}" + " with a mask" * masks)
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS and not allowed:
            raise AssertionError(f"the host waits in {func.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting():
    """Raise AssertionError where a GPU would be waited for."""
    with _Reads(), _Operators():
        yield


@contextmanager
def waiting():
    """Allow waiting inside: for a result that was asked for long before."""
    global allowed
    allowed += 1
    try:
        yield
    finally:
        allowed -= 1
