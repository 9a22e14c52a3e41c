"""What the operating system is told about memory.

Quantizing makes many large temporaries. The C library keeps what was freed, in pieces, for later: after a model of 200 MB
was quantized it held 400 MB that nobody used.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None where the C library has none (musl, macOS, Windows)."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back() -> bool:
    """Hand freed memory back; returns whether this C library can."""
    trim = _malloc_trim()
    if trim is None:
        return False
    trim(0)
    return True


def ask_for_large_pages(tensor: Tensor) -> bool:
    """Ask for pages of megabytes under memory that nothing was written to yet; returns whether the system took note.

    Weights are read once a token, front to back: with small pages the processor looks up a translation, and begins to
    fetch ahead anew, every 4096 bytes.
    """
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.nbytes) // page * page
    if last <= first:
        return False
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(advise(first, last - first, mmap.MADV_HUGEPAGE) == 0)


class Meter:
    """Calls :func:`give_back` each time that work on another ``every`` bytes is done."""

    def __init__(self, every: int = 16 << 20) -> None:
        self._every = every
        self._since = 0

    def add(self, nbytes: int) -> None:
        """``nbytes`` more were worked on."""
        self._since += nbytes
        if self._since >= self._every:
            self._since = 0
            give_back()
