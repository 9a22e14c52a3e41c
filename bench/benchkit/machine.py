"""The machine: what it is, what it is made to pretend, and how fast it reads memory."""

from __future__ import annotations

import itertools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchkit import onnxruntime_avx2

__all__ = ["AVX2", "cache_bytes", "describe", "emulate_avx2", "read_bandwidth", "reader", "summary", "use_threads"]

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "QCOMPILE_ISA": "avx2",
}
"""What holds torch's libraries and our kernels to AVX2. ONNX Runtime needs more (``onnxruntime_avx2.py``); llama.cpp has to
be built for it, and found by LLAMA_CPP_LIB_PATH."""

_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8")


def emulate_avx2(wanted: bool) -> None:
    """Start this program anew with torch, the kernels and ONNX Runtime held to AVX2, unless that is the case; nothing if not
    wanted."""
    if not wanted:
        return
    if any(os.environ.get(name) != value for name, value in AVX2.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2, **onnxruntime_avx2.environment()})
    import torch._inductor.config

    torch._inductor.config.cpp.simdlen = 256


def use_threads(count: int) -> int:
    """Have torch use that many threads, 0 = as many as this process has CPUs; returns how many."""
    import torch

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(count or available)
    return torch.get_num_threads()


def describe() -> dict[str, str]:
    """What a reader of figures must know of the machine and its software, in words."""
    import torch

    from qcompile.kernels.cpu import build

    info = _proc("/proc/cpuinfo")
    flags = set(_field(info, "flags").split())
    memory = re.search(r"MemTotal:\s*(\d+)", _proc("/proc/meminfo"))
    build.ensure_loaded()
    words = {
        "processor": _field(info, "model name") or platform.processor() or platform.machine(),
        "family": f"family {_field(info, 'cpu family')}, model {_field(info, 'model')}" if info else "unknown",
        "instruction sets": ", ".join(f for f in _FLAGS if f in flags) or "unknown",
        "cores and threads used": f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "last level cache": f"{cache_bytes() >> 20} MiB",
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _compiler(),
        "qcompile's kernels": build.isa() or "none",
    }
    if all(os.environ.get(name) == value for name, value in AVX2.items()):
        held = ["torch", "MKL", "oneDNN", "qcompile", *(["ONNX Runtime"] if "LD_PRELOAD" in os.environ else [])]
        held += ["llama.cpp"] if "LLAMA_CPP_LIB_PATH" in os.environ else []
        words["held to"] = f"AVX2 ({', '.join(held)})"
    return words


def summary() -> str:
    """The same as lines of text."""
    return "\n".join(f"{name}: {value}" for name, value in describe().items())


def cache_bytes() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    found = [_bytes(path.read_text("ascii")) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(found, default=0) or 32 << 20


def reader() -> tuple[Callable[[], object], int]:
    """A function with which torch's threads sum float32 that is in no cache, and the bytes that a call of it reads."""
    import torch

    pieces = torch.ones(max(8, 4 * cache_bytes() >> 24), 1 << 22)  # of 16 MiB
    turn = itertools.cycle(pieces)
    return lambda: next(turn).sum(), pieces[0].nbytes


def read_bandwidth(seconds: float = 0.5) -> float:
    """Bytes a second of :func:`reader`, the median call."""
    from benchkit.timing import medians

    read, size = reader()
    return size / medians({"read": read}, seconds)["read"]


def _proc(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _bytes(text: str) -> int:
    """``32768K`` and ``32M`` in bytes; 0 for anything else."""
    found = re.fullmatch(r"(\d+)([KMG]?)\s*", text)
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0


def _compiler() -> str:
    try:
        done = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return done.stdout.split("\n")[0]
