"""One setting of the C allocator that large CPU tensors want."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc, malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of unmapping them.

    By default every tensor above a few hundred KiB is mapped afresh, and its pages are faulted
    in and zeroed at each step. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)


def hand_back_freed_memory() -> None:
    """Give the memory kept by `keep_freed_memory` back, so that free memory is known."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
