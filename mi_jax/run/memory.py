"""Freed memory that stays with the process."""

import ctypes
import os
import sys

# glibc's names of what `mallopt` sets, and the values: all blocks from the heap, of one arena, which is not given back
# before 2 GiB of its end are free
_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}
_OWN = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Lets the C library keep what is freed, instead of giving large blocks back to the system at once.

    On a CPU, JAX allocates what a compiled call needs for itself anew in every call. Blocks over 32 MB are then mapped,
    filled with zeros by the system page by page, and unmapped, every time: 8 % of a training step of a dictionary.

    Call it before large arrays are made. It does nothing where the C library is not glibc, and where one of its
    environment variables (`MALLOC_…`) says what to do.

    Returns:
      Whether freed memory is kept.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _OWN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in _SETTINGS.values())
