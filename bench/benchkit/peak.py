"""What the processor can multiply at most: bytes by bytes, operands in registers, nothing loaded and nothing stored."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["floor", "peak"]

_SOURCE = """
#include <immintrin.h>
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define SUM(i) VECTOR a##i = ZERO;
#define STEP(i) { asm volatile("" : "+v"(x)); PRODUCT(a##i); }
#define KEEP(i) asm volatile("" : "+v"(a##i));
extern "C" void run(long count) {
  VECTOR x = ZERO, y = ZERO;
  asm volatile("" : "+v"(x), "+v"(y));
  EACH(SUM)
  for (long i = 0; i < count; ++i) { EACH(STEP) EACH(KEEP) }
}
"""
_SUMS = 12  # of 4 cycles' latency each: enough for two a cycle, and for sixteen registers with x, y and a product
_WIDE = ["-mavx512f", "-mavx512vnni", "-DVECTOR=__m512i", "-DZERO=_mm512_setzero_si512()"]
_SIGNED = "_mm256_maddubs_epi16(x, _mm256_sign_epi8(y, x))"
_HALF = ["-mavx2", "-DVECTOR=__m256i", "-DZERO=_mm256_setzero_si256()"]
#: By instruction set and whether codes have at most 4 bits: multiply-adds of a step, and flags.
_STEPS: dict[tuple[str, bool], tuple[int, list[str]]] = {
    ("avx512vnni", True): (64, [*_WIDE, "-DPRODUCT(a)=a = _mm512_dpbusd_epi32(a, x, y)"]),
    ("avxvnni", True): (32, [*_HALF, "-mavxvnni", "-DPRODUCT(a)=a = _mm256_dpbusd_avx_epi32(a, x, y)"]),
    ("avx2", True): (32, [*_HALF, "-DPRODUCT(a)=a = _mm256_add_epi16(a, _mm256_maddubs_epi16(x, y))"]),
    ("avx2", False): (
        32,
        [
            *_HALF,
            "-DPRODUCT(a)=a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(x, _mm256_sign_epi8(y, x)), y))",
        ],
    ),
}


@functools.cache
def peak(isa: str, bits: int, threads: int, seconds: float = 0.05) -> float:
    """Multiply-adds a second of codes of ``bits`` bits and int8, by the products that ``isa`` has, on so many threads;
    the best of three. 0 where that is not known: another instruction set, no compiler."""
    step = _STEPS.get((isa, bits <= 4)) or _STEPS.get((isa, True))
    library = _compiled(step[1]) if step is not None else None
    if step is None or library is None:
        return 0.0
    library.run.argtypes, library.run.restype = [ctypes.c_long], None
    count = 1 << 14
    while _together(library.run, count, 1) < seconds / 4:
        count *= 4
    return max(threads * count * _SUMS * step[0] / _together(library.run, count, threads) for _ in range(3))


def _compiled(flags: list[str]) -> ctypes.CDLL | None:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(_SOURCE, "ascii")
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        command = [*compiler, "-O2", *flags, "-fPIC", "-shared", str(source), "-o", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except OSError:
            return None
        return ctypes.CDLL(str(library)) if done.returncode == 0 else None


def floor(packed: int, bandwidth: float, products: int, most: float) -> float:
    """Seconds that a product takes at least: its packed bytes read at ``bandwidth``, its multiply-adds done at ``most`` a
    second (0: not known)."""
    return max(packed / bandwidth, products / most if most else 0.0)


def _together(run: Callable[[int], None], count: int, threads: int) -> float:
    """Seconds that ``run(count)`` takes on several threads at once: a foreign function leaves Python to the others."""
    workers = [threading.Thread(target=run, args=(count,)) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start
