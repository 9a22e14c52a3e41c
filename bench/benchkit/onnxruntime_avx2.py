"""ONNX Runtime held to AVX2. It has no switch for that and asks the processor itself, so a copy of it is made whose CPUID
instructions are traps, and a small library answers them (``cpuid_trap.c``)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["environment"]

CPUID, TRAP = b"\x0f\xa2", b"\xcc\x90"  # the same two bytes: a breakpoint and a no-op


def environment() -> dict[str, str]:
    """What a process must be started with to import the copy; empty where that cannot be made, with a line that says why."""
    if importlib.util.find_spec("onnxruntime") is None:
        return {}
    tools = [os.environ.get("CC", "gcc"), "objdump", "readelf"]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing or platform.system() != "Linux" or platform.machine() != "x86_64":
        print(f"ONNX Runtime is not held to AVX2: that needs x86-64 Linux and {', '.join(tools)}", flush=True)
        return {}
    folder = _made(tools[0])
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"LD_PRELOAD": str(folder / "cpuid_trap.so"), "PYTHONPATH": os.pathsep.join(paths)}


def _made(compiler: str) -> Path:
    version = importlib.metadata.version("onnxruntime")
    cache = Path(os.environ.get("QCOMPILE_CACHE_DIR") or Path.home() / ".cache" / "qcompile")
    target = cache / f"onnxruntime-{version}-avx2-{sys.implementation.cache_tag}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    found = importlib.util.find_spec("onnxruntime")
    source = Path(str(found.origin)).parent if found else Path()
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        whole = Path(scratch) / "whole"
        shutil.copytree(source, whole / "onnxruntime")
        trap = Path(__file__).with_name("cpuid_trap.c")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(trap), "-o", str(whole / "cpuid_trap.so")], check=True)
        for library in (whole / "onnxruntime" / "capi").glob("onnxruntime_pybind11_state*.so"):
            replace(library)
        whole.rename(target)
    return target


def replace(library: Path) -> int:
    """Make a trap of every CPUID instruction of an ELF file; returns how many there were."""
    addresses = [int(a, 16) for a in re.findall(r"^\s*([0-9a-f]+):\s+cpuid", _said("objdump", "-d", library), re.MULTILINE)]
    loads = [line.split() for line in _said("readelf", "-lW", library).splitlines() if line.split()[:1] == ["LOAD"]]
    segments = [(int(words[1], 16), int(words[2], 16), int(words[4], 16)) for words in loads]
    content = bytearray(library.read_bytes())
    for address in addresses:
        start = next(offset + address - base for offset, base, size in segments if base <= address < base + size)
        if content[start : start + 2] != CPUID:
            raise RuntimeError(f"{library}: no CPUID at {address:#x}, where objdump saw one")
        content[start : start + 2] = TRAP
    library.write_bytes(content)
    return len(addresses)


def _said(tool: str, option: str, library: Path) -> str:
    extra = ["--no-show-raw-insn"] if tool == "objdump" else []
    return subprocess.run([tool, option, *extra, str(library)], capture_output=True, text=True, check=True).stdout
