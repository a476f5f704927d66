"""What makes the host wait for a device, seen on a machine that has none."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim")


class NeverWaiting(TorchDispatchMode):
    """Fails on operators whose result, or its size, the host must read from the device."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operator._schema.name.removeprefix("aten::")
        if name in ("index", "index_put", "index_put_"):
            waits = any(each is not None and each.dtype == torch.bool for each in args[1])
        elif name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        else:
            waits = name in READS
        if waits:
            raise AssertionError(f"{operator} makes the host wait for the device")
        return operator(*args, **kwargs)
