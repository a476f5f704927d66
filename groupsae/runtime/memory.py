"""When freed memory of the CPU goes back to the system, where the C library is glibc."""

import ctypes
import os
from typing import Any

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
LARGE = 4 * 2**20  # bytes; smaller temporaries are reused faster from the heap


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc; does nothing where another allocator is used."""
    found: Any = getattr(ctypes.CDLL(None), function, None)
    if found is not None:
        found(*arguments)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of unmapping them.

    By default every tensor above a few hundred KiB is mapped afresh, and its pages are faulted
    in and zeroed at each step.
    """
    _glibc("mallopt", M_MMAP_MAX, 0)
    _glibc("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)
    _glibc("mallopt", M_TOP_PAD, 64 * 2**20)


def hand_back_freed_memory() -> None:
    """Give the memory kept by `keep_freed_memory` back, so that free memory is known."""
    _glibc("malloc_trim", 0)


def return_large_tensors() -> None:
    """Let glibc return each freed block of 4 MiB or more to the system, from now on.

    By default it raises that limit to 32 MiB, the first time a block of such a size is freed. Then
    the logits of a batch come from its heap, and every small array that is kept leaves a hole of
    their size behind it: an evaluation of 93 pairs of SAE and layer grew to 17 GB instead of 0.8.
    Does nothing where the user's environment sets the limit.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _glibc("mallopt", M_MMAP_THRESHOLD, LARGE)
