"""Giving freed memory back to the operating system.

Quantizing makes many large temporaries. The C library keeps what was freed, in pieces, for later: after a model of 200 MB
was quantized it held 400 MB that nobody used.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


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
