"""How much memory this process holds, in bytes, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Resident", "peak", "reset_peak", "resident", "settle"]

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Resident:
    """Resident bytes of this process: in all, and the part of it that is pages of files (libraries, mapped weights)."""

    total: int
    file: int


def resident() -> Resident:
    """What is resident now. Elsewhere than on Linux the part in files is unknown and given as 0."""
    if _STATUS.exists():
        lines = _status()
        return Resident(lines["VmRSS"], lines.get("RssFile", 0) + lines.get("RssShmem", 0))
    import psutil

    return Resident(int(psutil.Process().memory_info().rss), 0)


def reset_peak() -> bool:
    """Start the peak anew from here. False where the system cannot: then ``peak`` is the process's whole life's."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # proc(5): 5 resets the peak resident set size
    except OSError:
        return False
    return True


def peak() -> int:
    """The most bytes resident since ``reset_peak``."""
    if _STATUS.exists():
        return _status()["VmHWM"]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)


def settle() -> None:
    """Collect garbage and let the allocator give free pages back, so that ``resident`` counts what is really held."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library: it has its own policy


def _status() -> dict[str, int]:
    out = {}
    for line in _STATUS.read_text("ascii", "replace").splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            out[name] = int(value.split()[0]) * 1024
    return out
