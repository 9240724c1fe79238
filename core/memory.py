"""What the C library keeps of memory that was freed; glibc alone is told, others do as they do."""

import ctypes
import functools
import sys
from typing import Any

_ARENA_MAX = -8  # M_ARENA_MAX in glibc's malloc.h


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


@functools.cache
def share_one_heap() -> None:
    """Bring glibc to serve threads that start from now on from one heap.

    By default each has its own, and what one has freed is of no use to another: a build whose threads decode a hundred
    images again and again kept 0.3 GB for them.
    """
    if hasattr(_libc(), "mallopt"):
        _libc().mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Give freed memory back to the system; it costs milliseconds, and page faults when memory is wanted again."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)
