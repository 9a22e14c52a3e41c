"""A library's questions to the processor are answered as one with AVX2 would: benchkit/onnxruntime_avx2.py."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchkit import onnxruntime_avx2

TOOLS = ("gcc", "objdump", "readelf")
ASKS = """
#include <cpuid.h>
unsigned feature(unsigned leaf, unsigned subleaf, int which) {
  unsigned r[4];
  __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
  return r[which];
}
"""
PRINTS = """
import ctypes, sys
feature = ctypes.CDLL(sys.argv[1]).feature
feature.restype = ctypes.c_uint
print(*(feature(*case) for case in {cases}))
"""
#: leaf, subleaf, register: all of AVX-512 and its like, then what must stay as it is.
CASES = [(7, 0, 1), (7, 0, 2), (7, 1, 0), (1, 0, 2), (0, 0, 1)]


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or any(shutil.which(t) is None for t in TOOLS),
    reason=f"needs x86-64 Linux and {', '.join(TOOLS)}",
)
def test_traps(tmp_path: Path) -> None:
    (tmp_path / "asks.c").write_text(ASKS)
    trap = Path(onnxruntime_avx2.__file__).with_name("cpuid_trap.c")
    for source, name in ((tmp_path / "asks.c", "asks.so"), (trap, "trap.so")):
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", str(source), "-o", str(tmp_path / name)], check=True)
    asks = tmp_path / "asks.so"

    def answers(**more: str) -> list[int]:
        words = [sys.executable, "-c", PRINTS.format(cases=CASES), str(asks)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **more})
        return [int(word) for word in done.stdout.split()]

    before = answers()
    assert onnxruntime_avx2.replace(asks) == 1
    after = answers(LD_PRELOAD=str(tmp_path / "trap.so"))
    assert after[0] & (1 << 16) == 0 and after[0] & (1 << 5) == before[0] & (1 << 5)  # AVX-512F and AVX2
    assert after[1] & (1 << 11) == 0 and after[2] & (1 << 4) == 0  # AVX512-VNNI and AVX-VNNI
    assert (after[3] & 0x1000, after[4]) == (before[3] & 0x1000, before[4])  # FMA, the vendor
