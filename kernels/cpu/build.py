"""Builds and loads the CPU kernels: on first need, in seconds, once a machine; never at import.

:func:`ensure_loaded` is what the passes call before they emit a packed operator. It takes, in this order, the library a
wheel brought along, the one in the cache (``QCOMPILE_CACHE_DIR``, else ``~/.cache/qcompile``), or a fresh build with
``CXX``, ``g++``, ``clang++`` or ``c++``. With no compiler the references in plain torch run instead: slower, equal in
result, said once in a warning and in :func:`status`. ``QCOMPILE_ISA`` (portable, avx2, avxvnni, avx512vnni, neon) overrides
the choice of instruction set.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

_log = logging.getLogger("qcompile.kernels.cpu")
_HERE = Path(__file__).parent
_COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-tree-reassoc"]
_X86 = {
    "isa_avx2.cpp": ["-O3", "-mavx2", "-mfma", "-mf16c"],
    "isa_avxvnni.cpp": ["-O3", "-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "isa_avx512vnni.cpp": [
        *("-O3", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    ],
}
_ARM = {"isa_neon.cpp": ["-O3", "-march=armv8.2-a+dotprod"]}
#: Units that a build may go without: what Linux calls the feature that they need, and how select.cpp is told.
_OPTIONAL = {
    "isa_avx512vnni.cpp": ("avx512_vnni", "-DQCOMPILE_WITHOUT_AVX512VNNI"),
    "isa_avxvnni.cpp": ("avx_vnni", "-DQCOMPILE_WITHOUT_AVXVNNI"),
    "isa_neon.cpp": ("asimddp", "-DQCOMPILE_WITHOUT_NEON"),
}
_lock = threading.Lock()


@dataclass(frozen=True)
class LoadResult:
    """loaded: the kernels run. path: the library. isa: the instruction set in use. reason: why not, or where from."""

    loaded: bool
    path: Path | None
    isa: str | None
    reason: str


class BuildError(RuntimeError):
    """There is no C++ compiler, or it failed; the message has its output."""


_result: LoadResult | None = None


def ensure_loaded() -> LoadResult:
    """Load the kernels, building them if need be; calling it again costs nothing.

    Returns why not where there is no compiler. Raises RuntimeError when ``QCOMPILE_ISA`` names an instruction set that
    is unknown or that this processor lacks.
    """
    global _result
    if _result is None:
        with _lock:
            if _result is None:
                _result = _load()
    return _result


load = ensure_loaded


def ready() -> bool:
    """Whether the kernels are loaded, or are now because a library was there: for work that plain torch does as well,
    which is no reason to run a compiler."""
    if _result is None:
        try:
            if not _find()[0].exists():
                return False
        except BuildError:
            return False
    return ensure_loaded().loaded


def status() -> str:
    """One line: which library and instruction set run, or why the references do."""
    if _result is None:
        return "CPU kernels: not needed so far"
    if not _result.loaded:
        return f"CPU kernels: none, plain torch runs instead: {_result.reason}"
    return f"CPU kernels: {_result.isa}, {_result.path} ({_result.reason})"


def library_path() -> Path:
    """The built library, for programs that load it themselves (AOTInductor). Raises BuildError where it can't be built."""
    return _find_or_build()[0]


def isa() -> str | None:
    """The instruction set in use, or None where the kernels are not loaded."""
    return _call("qcompile_isa") if _result is not None and _result.loaded else None


def set_isa(name: str) -> None:
    """Run another instruction set from now on, for tests and measurements; "" chooses again. Raises ValueError."""
    if not ensure_loaded().loaded:
        raise ValueError(f"cannot run {name!r}: {status()}")
    problem = _call("qcompile_set_isa", name.encode())
    if problem is not None:
        raise ValueError(problem)


def _call(symbol: str, *arguments: bytes) -> str | None:
    if _result is None or _result.path is None:
        return None
    function = getattr(ctypes.CDLL(str(_result.path)), symbol)
    function.restype = ctypes.c_char_p
    answer = function(*arguments)
    return None if answer is None else answer.decode()


def _load() -> LoadResult:
    global _result
    try:
        path, reason = _find_or_build()
    except BuildError as error:
        _log.warning("the CPU kernels could not be built; plain torch runs instead, slower. %s", error)
        return LoadResult(False, None, None, str(error))
    torch.ops.load_library(str(path))
    _result = LoadResult(True, path, None, reason)  # _call needs the path
    wanted = os.environ.get("QCOMPILE_ISA", "")
    problem = _call("qcompile_set_isa", wanted.encode())
    if problem is not None:
        _result = None
        raise RuntimeError(problem)
    result = LoadResult(True, path, _call("qcompile_isa"), reason)
    _log.info("CPU kernels: %s from %s (%s)", result.isa, path, reason)
    return result


def _find_or_build() -> tuple[Path, str]:
    path, reason = _find()
    if path.exists():
        return path, reason
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / "lock"):
        if path.exists():  # another process was first
            return path, reason
        build(path)
    return path, "built now"


def _find() -> tuple[Path, str]:
    """The library that the installation brought, or the place in the cache of one that this compiler builds."""
    brought = prebuilt_path()
    if brought.exists():
        return brought, "part of the installation"
    return _cache_folder(_compiler()) / f"libqcompile_cpu{_suffix()}", "built before"


def build(path: Path, compiler: list[str] | None = None, everywhere: bool = False) -> Path:
    """Compile the kernels into ``path``, which appears whole or not at all. Raises BuildError.

    Without ``everywhere`` what this processor cannot run is left out. A wheel brings ``libqcompile_cpu-<hash of the
    sources>.so`` along: ``build(prebuilt_path(), everywhere=True)``.
    """
    compiler = _compiler() if compiler is None else compiler
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
        jobs = [
            (name, [*compiler, *flags, "-c", str(_HERE / name), "-o", str(Path(scratch) / f"{name}.o")])
            for name, flags in _units(compiler, everywhere).items()
        ]
        with ThreadPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
            list(pool.map(lambda job: _run(job[1]), jobs))
        linked = Path(scratch) / path.name
        objects = [str(Path(scratch) / f"{name}.o") for name, _ in jobs]
        # Python loads libtorch privately, so its symbols must be asked for by the library's name
        torch_library = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        _run([*compiler, "-shared", *objects, *torch_library, "-o", str(linked)])
        linked.replace(path)
    return path


def prebuilt_path() -> Path:
    """Where a library that comes with the installation must lie to be found."""
    return _HERE / f"libqcompile_cpu-{_sources_hash()}{_suffix()}"


def _units(compiler: list[str], everywhere: bool = False) -> dict[str, list[str]]:
    """Each source file with its flags, the slowest to compile first; for this processor, or for all of its kind.

    Instruction sets that the compiler is too old for are left out.
    """
    include = Path(torch.__file__).parent / "include"
    machine = platform.machine().lower()
    units = dict(_X86 if machine in ("x86_64", "amd64") else _ARM if machine in ("aarch64", "arm64") else {})
    # Where there are others, only processors without AVX2 run this one, and more takes three times as long to compile.
    units["isa_portable.cpp"] = ["-O1" if units else "-O2", "-ftree-vectorize"]
    units["ops.cpp"] = ["-O2", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include)]
    units["select.cpp"] = ["-O2"]
    for name, (feature, without) in _OPTIONAL.items():
        if name in units and not ((everywhere or _runs(feature)) and _accepts(compiler, tuple(units[name]))):
            del units[name]
            units["select.cpp"].append(without)
    return {name: [*_COMMON, *flags] for name, flags in units.items()}


def _accepts(compiler: list[str], flags: tuple[str, ...]) -> bool:
    """Whether a compiler knows these flags; a compiler that cannot be run is left for the build to report."""
    try:
        return _preprocesses(tuple(compiler), flags)
    except OSError:
        return True


@functools.cache
def _preprocesses(compiler: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    command = [*compiler, *flags, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@functools.cache
def _runs(flag: str) -> bool:
    """Whether this processor has an instruction set, as Linux names it; True where that cannot be told."""
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return True
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), f"flags: {flag}")
    return flag in flags.split()


def _compiler() -> list[str]:
    wanted = os.environ.get("CXX")
    for command in [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    tried = f"CXX={wanted}" if wanted else "g++, clang++, c++"
    raise BuildError(f"no C++ compiler found ({tried}): install one, or set CXX")


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@functools.cache
def _sources_hash() -> str:
    digest = hashlib.sha256()
    for file in sorted([*_HERE.glob("*.cpp"), *_HERE.glob("*.h"), Path(__file__)]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update(platform.machine().encode())
    return digest.hexdigest()[:16]


def _cache_folder(compiler: list[str]) -> Path:
    root = os.environ.get("QCOMPILE_CACHE_DIR")
    base = Path(root) if root else Path.home() / ".cache" / "qcompile"
    units = {name: [f for f in flags if not f.startswith("/")] for name, flags in _units(compiler).items()}
    key = repr((_sources_hash(), units, torch.__version__, compiler, _version(compiler[0])))
    return base / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _suffix() -> str:
    return ".dylib" if sys.platform == "darwin" else ".so"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed with status {done.returncode}:\n{done.stderr[-4000:]}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; on systems without flock the atomic rename alone keeps the result whole."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
