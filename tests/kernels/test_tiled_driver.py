"""The CPU kernels without torch against loops in double: natively, and NEON under an emulator where there is one."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from tiled_weights import ARM

from qcompile.kernels.cpu import build

SOURCES = Path(build.__file__).parent
DRIVER = Path(__file__).parents[1] / "support" / "tiled_driver.cpp"
COMMON = [*build._COMMON, f"-I{SOURCES}"]
WITHOUT = [f"-DQCOMPILE_WITHOUT_{name}" for name in ("AVX512VNNI", "AVXVNNI", "NEON")]


def compiled(folder: Path, compiler: str, units: dict[str, list[str]], link: list[str]) -> Path:
    """The driver with these units of the kernels and the portable one."""
    made = folder / "driver"
    objects = []
    for name, flags in {**units, "isa_portable.cpp": ["-O1"]}.items():
        objects.append(str(folder / f"{name}.o"))
        subprocess.run([compiler, *COMMON, *flags, "-c", str(SOURCES / name), "-o", objects[-1]], check=True)
    left_out = [flag for flag in WITHOUT if f"isa_{flag.rpartition('_')[2].lower()}.cpp" not in units]
    command = [compiler, *COMMON, "-O2", *left_out, *link, str(SOURCES / "select.cpp"), str(DRIVER), *objects]
    subprocess.run([*command, "-pthread", "-o", str(made)], check=True)
    return made


def check(command: list[str], *isas: str) -> None:
    done = subprocess.run([*command, *isas], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(isas)
    assert all(int(line.split()[1]) > 1000 for line in done.stdout.splitlines())


def test_native(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine().lower() not in ("x86_64", "amd64") or not build._runs("avx2"):
        pytest.skip("wants a C++ compiler and a processor with AVX2")
    avx2 = {"isa_avx2.cpp": ["-O1", *build._X86["isa_avx2.cpp"][1:]]}
    check([str(compiled(tmp_path, compiler, avx2, []))], "avx2", "portable")


def test_neon_under_an_emulator(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if ARM:
        pytest.skip("the other tests run NEON here, on the processor")
    if compiler is None or emulator is None:
        pytest.skip("wants aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    neon = {"isa_neon.cpp": build._ARM["isa_neon.cpp"]}
    check([emulator, str(compiled(tmp_path, compiler, neon, ["-static"]))], "neon", "portable")
