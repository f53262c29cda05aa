"""What this process holds in memory, and how it gives back what it no longer needs."""

from __future__ import annotations

import ctypes
import sys

import psutil


def resident_bytes() -> int:
    """Return the resident set of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def give_back_memory() -> None:
    """Have glibc return what it keeps of freed memory: scattered pieces, to which every layer would add.

    Other allocators are left alone.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
