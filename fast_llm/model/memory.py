"""Freed memory stays with the process.

The C library hands large blocks back to the kernel when they are freed and asks for them again: each step
then pays for its activations page by page (4 KiB each, zeroed), which on the CPU is a tenth to a quarter of the
step. The allocator of GPU memory does this by itself.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Never give memory back to the kernel, from now on; whether this C library can (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Without mmap all blocks come from the heap, which is trimmed only above a threshold.
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
