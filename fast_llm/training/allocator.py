"""Freed memory stays with the process, in large pages.

The C library hands large blocks back to the kernel when they are freed and asks for them again: each step then pays
for its activations page by page (4 KiB each, zeroed), a tenth to a fifth of a step on the CPU. The allocator of GPU
memory keeps its memory by itself.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """From now on; whether this C library can (glibc). To be called before PyTorch's first large tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch then asks for pages of 2 MiB
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    )
    # Without mmap all blocks come from the heap, which is trimmed only above a threshold.
    return (
        mallopt is not None
        and bool(mallopt(_M_MMAP_MAX, 0))
        and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    )
