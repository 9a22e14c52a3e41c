"""Building and loading the CPU kernels: never at import, once a machine, safe between processes, loud when it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile.kernels.cpu import build

WITH_COMPILER = pytest.mark.skipif(not build.ensure_loaded().loaded, reason="no C++ compiler here")


def python(code: str, cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "QCOMPILE_ISA")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env={**clean, "QCOMPILE_CACHE_DIR": str(cache), **env},
    )  # fmt: skip


def test_importing_builds_nothing(tmp_path: Path) -> None:
    code = "import qcompile.kernels; from qcompile.kernels.cpu import build; print(build.status(), build.isa())"
    done = python(code, tmp_path)
    assert done.stdout.strip() == "CPU kernels: not needed so far None", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_the_reference_runs_and_a_warning_says_so(tmp_path: Path) -> None:
    code = """
import torch, qcompile.kernels
from qcompile.kernels.cpu import build
from qcompile.kernels.layouts.tiled import pack
for _ in range(2):
    print(build.ensure_loaded().loaded)
print(build.status())
t = pack(torch.full((2, 3), 9, dtype=torch.uint8), torch.ones(2, 1), None, 4, 0)
print(torch.ops.qcompile.linear_tiled(torch.ones(1, 3), t.codes, t.scale, None, None, 4, 0, 2).tolist())
"""
    done = python(code, tmp_path, CXX="no-such-compiler -O2")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["False", "False"], done.stderr
    assert "no-such-compiler" in lines[2]
    assert "plain torch runs instead" in lines[2]
    assert lines[3] == "[[3.0, 3.0]]"
    assert done.stderr.count("could not be built") == 1


def test_what_the_compiler_says_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'line 7: that is wrong' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "prebuilt_path", lambda: tmp_path / "none")
    with pytest.raises(build.BuildError, match=r"status 3:\nline 7: that is wrong"):
        build.library_path()
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.suffix == ".so"]  # nothing half done is left


def test_the_cache_key_follows_flags_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build._cache_folder(["c++"])
    assert build._cache_folder(["c++"]) == first
    assert build._cache_folder(["c++", "-O1"]) != first
    monkeypatch.setattr(build, "_COMMON", [*build._COMMON, "-DX"])
    assert build._cache_folder(["c++"]) != first


@WITH_COMPILER
def test_an_instruction_set_that_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"QCOMPILE_ISA=sse9 cannot run here.*portable"):
        build.set_isa("sse9")
    cache = build.library_path().parent.parent  # so that nothing is built again
    code = "from qcompile.kernels.cpu import build; build.ensure_loaded(); print(build.isa())"
    done = python(code, cache, QCOMPILE_ISA="sse9")
    assert "QCOMPILE_ISA=sse9 cannot run here" in done.stderr
    assert done.returncode == 1
    done = python(code, cache, QCOMPILE_ISA="portable")
    assert done.stdout.strip() == "portable", done.stderr


@WITH_COMPILER
def test_loading_again_costs_nothing_and_says_where_from() -> None:
    first = build.ensure_loaded()
    assert build.ensure_loaded() is first
    assert first.path is not None
    assert first.path.exists()
    assert str(first.path) in build.status()


@WITH_COMPILER
def test_a_library_that_came_with_the_installation_is_taken_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought = tmp_path / build.prebuilt_path().name
    shutil.copy(build.library_path(), brought)
    monkeypatch.setattr(build, "prebuilt_path", lambda: brought)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library_path() == brought


@WITH_COMPILER
@pytest.mark.slow
def test_two_processes_build_once(tmp_path: Path) -> None:
    code = "from qcompile.kernels.cpu import build; r = build.ensure_loaded(); print(r.reason, r.isa)"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "QCOMPILE_CACHE_DIR": str(tmp_path)}
    if build.library_path() == build.prebuilt_path():
        pytest.skip("the library came with the installation")
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    said = sorted(p.communicate()[0].split()[1] for p in processes)
    assert said == ["before", "now"]
    (folder,) = tmp_path.iterdir()
    assert sorted(f.name for f in folder.iterdir()) == ["libqcompile_cpu.so", "lock"]
