"""Compiles CUDA C++ when it is first needed: by NVRTC, which torch's CUDA build brings along, or by nvcc. No GPU is needed.

What was compiled is kept on disk (``QCOMPILE_CACHE_DIR``, else ``~/.cache/qcompile``), by a hash of source, architecture,
compiler and its version; a file appears there whole or not at all.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_FLAGS = ("--std=c++17", "-Werror=all-warnings", "--ptxas-options=-v")


class BuildError(RuntimeError):
    """There is no CUDA compiler, or it failed; the message has its output."""


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    code: a cubin; or PTX, where the compiler is older than the GPU and the driver has to finish. log: the compiler's.
    """

    code: bytes
    log: str


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as the assembler says: registers a thread, bytes spilled, bytes of shared memory a block."""

    registers: int
    spilled: int
    shared: int


def text(name: str) -> str:
    """A source file of this folder."""
    return (_HERE / name).read_text(encoding="utf-8")


def headers() -> dict[str, str]:
    """What ``linear.cu`` includes."""
    return {"ptx.h": text("ptx.h")}


def compiler() -> str | None:
    """Which compiler there is, with its version; None if there is none."""
    if _nvrtc() is not None:
        return f"NVRTC {'.'.join(map(str, _nvrtc_version()))}"
    found = _nvcc()
    return None if found is None else f"nvcc {_nvcc_version(found)}"


def binary(source: str, capability: int) -> bytes:
    """Code for a GPU of that compute capability (80 for 8.0), from the disk where it was compiled before.

    Raises:
        BuildError: no compiler, or it refused the source.
    """
    name = compiler()
    if name is None:
        raise BuildError(
            "no CUDA compiler: NVRTC comes with torch's CUDA build (or `pip install cuda-bindings nvidia-cuda-nvrtc`), "
            "nvcc with the CUDA toolkit"
        )
    key = hashlib.sha256(repr((source, sorted(headers().items()), capability, name, _FLAGS)).encode()).hexdigest()[:24]
    root = os.environ.get("QCOMPILE_CACHE_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "qcompile"
    path = folder / f"cuda-{key}.cubin"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    code = compile_source(source, headers(), capability).code
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".cuda-", delete=False) as file:
        try:
            file.write(code)
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return code


def compile_source(source: str, included: Mapping[str, str], capability: int) -> Binary:
    """Compile, every warning an error. Raises BuildError."""
    if _nvrtc() is not None:
        return _by_nvrtc(source, included, capability)
    found = _nvcc()
    if found is None:
        raise BuildError("no CUDA compiler")
    return _by_nvcc(found, source, included, capability)


def resources(log: str) -> Resources:
    """Read the assembler's words. Raises ValueError where they are not there (nothing was assembled)."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill", log)
    shared = re.search(r"(\d+) bytes smem", log)
    if registers is None or not spills:
        raise ValueError("the log says nothing of registers; give that of one kernel, compiled for a real architecture")
    return Resources(int(registers[1]), sum(map(int, spills)), int(shared[1]) if shared else 0)


@functools.cache
def _nvrtc() -> object | None:
    """NVRTC's bindings, if they and the library are there."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception:  # the bindings raise errors of their own where the library is missing
        return None
    return nvrtc


@functools.cache
def _nvrtc_version() -> tuple[int, ...]:
    from cuda.bindings import nvrtc

    return tuple(int(part) for part in nvrtc.nvrtcVersion()[1:])


def _by_nvrtc(source: str, included: Mapping[str, str], capability: int) -> Binary:
    from cuda.bindings import nvrtc

    def ask(result: tuple[object, ...]) -> object:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(f"NVRTC: {result[0]}")
        return result[1] if len(result) == 2 else result[1:]

    known = [int(arch) for arch in ask(nvrtc.nvrtcGetSupportedArchs())]  # type: ignore[attr-defined]
    real = capability in known
    best = max((arch for arch in known if arch <= capability), default=None)
    if best is None:
        raise BuildError(f"{compiler()} compiles for sm_{min(known)} and newer, not sm_{capability}")
    target = f"sm_{capability}" if real else f"compute_{best}"
    texts, names = [t.encode() for t in included.values()], [n.encode() for n in included]
    program = ask(nvrtc.nvrtcCreateProgram(source.encode(), b"qcompile.cu", len(texts), texts, names))
    try:
        flags = [flag.encode() for flag in (f"--gpu-architecture={target}", *(_FLAGS if real else _FLAGS[:-1]))]
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), flags)[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS
        length = int(ask(nvrtc.nvrtcGetProgramLogSize(program)))  # type: ignore[call-overload]
        said = _filled(nvrtc.nvrtcGetProgramLog, program, length).rstrip(b"\0").decode(errors="replace")
        if failed:
            raise BuildError(f"NVRTC refuses the source for {target}:\n{said[-4000:]}")
        size = int(ask((nvrtc.nvrtcGetCUBINSize if real else nvrtc.nvrtcGetPTXSize)(program)))  # type: ignore[call-overload]
        return Binary(_filled(nvrtc.nvrtcGetCUBIN if real else nvrtc.nvrtcGetPTX, program, size), said)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _filled(function: object, program: object, size: int) -> bytes:
    """What a function of NVRTC's writes into a buffer; not into a bytes object: short ones are shared by all of Python."""
    buffer = bytearray(size)
    function(program, buffer)  # type: ignore[operator]
    return bytes(buffer)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside = Path(home) / "bin" / "nvcc" if home else None
    return str(beside) if beside is not None and beside.exists() else shutil.which("nvcc")


@functools.cache
def _nvcc_version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"V([\d.]+)", said)
    return found[1] if found else "?"


def _by_nvcc(nvcc: str, source: str, included: Mapping[str, str], capability: int) -> Binary:
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        for name, content in {"qcompile.cu": source, **included}.items():
            (Path(folder) / name).write_text(content, encoding="utf-8")
        out = Path(folder) / "out.cubin"
        command = [nvcc, "-cubin", f"-arch=sm_{capability}", *_FLAGS, str(Path(folder) / "qcompile.cu"), "-o", str(out)]
        command[command.index("-Werror=all-warnings")] = "--Werror=all-warnings"
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"nvcc refuses the source for sm_{capability}:\n{done.stderr[-4000:]}")
        return Binary(out.read_bytes(), done.stdout + done.stderr)
