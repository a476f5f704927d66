"""Options that let code of a language model's owner run on this machine."""

from collections.abc import Mapping
from typing import Any


def runs_code(load: Mapping[str, Any]) -> str | None:
    """Return the option of from_pretrained that runs such code, if one is set.

    >>> runs_code({"device_map": "auto"}), runs_code({"attn_implementation": "owner/kernel"})
    (None, 'attn_implementation')
    """
    if load.get("trust_remote_code"):
        return "trust_remote_code"
    if load.get("use_kernels"):
        return "use_kernels"
    # a kernel that is fetched from the Hub
    kernels = (n for n in load if n.endswith("_implementation") and "/" in str(load[n]))
    return next(kernels, None)
