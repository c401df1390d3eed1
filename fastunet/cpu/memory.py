"""Freed memory of a CPU, which glibc gives back to the system: to get it anew, page by page filled with zeros, takes a
noticeable part of a training step, and of a call of inference.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's parameters for mallopt (malloc.h), and the variables by which people set them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_LARGEST_INT = 2**31 - 1
# What glibc begins with: larger blocks are the system's own, and go back to it.
_FIRST_BLOCK = 1 << 17
_kept = _FIRST_BLOCK


def keep_freed_memory(block: int) -> None:
    """Have the process keep freed blocks of up to so many bytes, and up to twice as much memory beyond what is in use.

    A larger value stays, and so does what people have set by glibc's variables. Without glibc nothing is done.
    """
    global _kept
    if block > _kept:
        _kept = block
        _set(_MMAP_THRESHOLD, block)
        _set(_TRIM_THRESHOLD, min(2 * block, _LARGEST_INT))


@contextmanager
def long_lived() -> Iterator[None]:
    """Within the block let large blocks be the system's own: of what stays for long, holes remain in kept memory."""
    _set(_MMAP_THRESHOLD, _FIRST_BLOCK)
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _kept)


def _set(parameter: int, value: int) -> None:
    if any(os.environ.get(name) for name in _VARIABLES):
        return
    try:
        ctypes.CDLL(None).mallopt(parameter, value)
    except (AttributeError, TypeError, OSError):  # Not glibc, or no such library at all.
        return
