"""Runs CUDA and Metal kernels on the CPU: their sources compiled as C++, lanes as fibers (``gpu_shim/fibers.h``).

:func:`compile_metal` stands in for ``torch.mps.compile_shader``: same calls, CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
#: The positions that a Metal kernel of ours takes last, in this order: the emulator hands them over so.
_POSITIONS = re.compile(
    r"uint3 \w+ \[\[threadgroup_position_in_grid\]\],\s*uint \w+ \[\[thread_index_in_simdgroup\]\],\s*"
    r"uint \w+ \[\[simdgroup_index_in_threadgroup\]\]\s*\)"
)


class KernelError(RuntimeError):
    """A kernel could not go on, or touched memory that is not its own."""


class _Argument(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gpu-shim-")


@functools.cache
def _build(source: str, *flags: str) -> ctypes.CDLL:
    """A library of that C++ text; built once a process."""
    if COMPILER is None:
        raise RuntimeError("no C++ compiler")
    name = hashlib.sha256(repr((source, flags)).encode()).hexdigest()[:16]
    path = Path(_folder().name) / f"{name}.cpp"
    path.write_text(source)
    library = path.with_suffix(".so")
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
    command += [*flags, f"-I{HERE / 'gpu_shim'}", str(path), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    return loaded


def run(library: ctypes.CDLL, name: str, args: Sequence[Any], grid: Sequence[int], threads: int) -> None:
    """Run one kernel; tensors are written in place. Scalars are ctypes values. Raises KernelError."""
    given = (_Argument * len(args))()
    for slot, value in zip(given, args, strict=True):
        if isinstance(value, Tensor):
            if not value.is_contiguous():
                raise ValueError("kernels take contiguous tensors")
            slot.data, slot.bytes = value.data_ptr(), value.numel() * value.element_size()
        else:
            slot.data, slot.bytes = ctypes.addressof(value), 0
    blocks = (ctypes.c_int * 3)(*grid, *[1] * (3 - len(grid)))
    problem = library.run(name.encode(), given, len(args), blocks, threads)
    if problem:
        raise KernelError(f"{name}: {problem.decode()}")


class MetalLibrary:
    """What ``torch.mps.compile_shader`` gives, for CPU tensors."""

    def __init__(self, source: str, *flags: str) -> None:
        names = re.findall(r"kernel void (\w+)\(", source)
        if len(_POSITIONS.findall(source)) != len(names):
            raise ValueError("each kernel takes threadgroup, lane and simdgroup, in this order, last")
        calls = "\n".join(
            f'if (!strcmp(name, "{n}")) return shim::run_grid(arguments, count, grid, lanes,\n'
            f"  [](void* const* a, const int* at, int i) {{ shim::call_with({n}, a,\n"
            f"    metal::uint3{{(uint)at[0], (uint)at[1], (uint)at[2]}}, (uint)(i % 32), (uint)(i / 32)); }});"
            for n in names
        )
        text = (
            f'#include <tuple>\n#include "launch.h"\n{source}\n'
            'extern "C" const char* run(\n'
            "    const char* name, shim::Argument* arguments, int count, const int* grid, int lanes) {"
            f'{calls}\nreturn "no such kernel"; }}'
        )
        self._library = _build(text, f"-I{HERE / 'metal_shim' / 'run'}", *flags)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, threads: Sequence[int], group_size: Sequence[int], arg_casts: Mapping[int, str]) -> None:
            values: list[Any] = list(args)
            for i, value in enumerate(args):
                if not isinstance(value, Tensor):
                    # as torch does: an int is a long, unless it is cast
                    values[i] = ctypes.c_int32(value) if arg_casts.get(i) == "int32" else ctypes.c_int64(value)
            sizes = [*group_size, *[1] * (len(threads) - len(group_size))]
            if any(t % s for t, s in zip(threads, sizes, strict=True)):
                raise ValueError(f"threads {threads} are not whole threadgroups of {group_size}")
            grid = [t // s for t, s in zip(threads, sizes, strict=True)]
            count = 1
            for size in sizes:
                count *= size
            run(self._library, name, values, grid, count)

        return call


@functools.cache
def compile_cuda(source: str, *flags: str) -> ctypes.CDLL:
    """A CUDA source that includes ``ptx.h``, with the emulation in that file's place; for :func:`run`."""
    names = re.findall(r"(?<=__global__)[^;{]*?(\w+)\(\s*(?:const|u16)", source)
    calls = "\n".join(
        f'if (!strcmp(name, "{n}")) return shim::run_grid(arguments, count, grid, lanes,\n'
        f"  [](void* const* a, const int* at, int) {{ blockIdx = Dim{{at[0], at[1], at[2]}}; shim::call_with({n}, a); }});"
        for n in names
    )
    text = (
        f'#include <tuple>\n#include "launch.h"\n{source}\n'
        'extern "C" const char* run(\n'
        "    const char* name, shim::Argument* arguments, int count, const int* grid, int lanes) {"
        f'{calls}\nreturn "no such kernel"; }}'
    )
    return _build(text, f"-I{HERE / 'cuda_shim'}", *flags)


@functools.cache
def compile_metal(source: str, *flags: str) -> MetalLibrary:
    """Stands in for ``torch.mps.compile_shader``."""
    return MetalLibrary(source, *flags)
