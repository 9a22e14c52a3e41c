"""Kernels compiled for GPUs that are not here: what the machine code must be; that it is what docs/gpu_report.md says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT: dict[str, dict[str, float]] = json.loads((ROOT / "docs" / "gpu_report.json").read_text(encoding="utf-8"))
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
TENSOR_CORE = ("gemm", "grouped_gemm", "quantized_gemm")


def check(name: str, facts: dict[str, float]) -> list[str]:
    """What is wrong with a kernel."""
    arch, kernel, case = name.split(" | ")
    few = " M=1" in case or " M=2" in case
    wrong = []
    if facts["traps"]:
        wrong.append("compiled to a trap")
    if facts["spills"]:
        wrong.append(f"spills {facts['spills']} bytes")
    if facts["shared"] > facts["shared_limit"]:
        wrong.append(f"{facts['shared']} bytes of shared memory, the part has {facts['shared_limit']}")
    if kernel in ("gemv", *TENSOR_CORE) and (facts["wide"] < 1 or facts["narrow"]):
        wrong.append(f"{facts['wide']} loads of 128 bits, {facts['narrow']} of less than 32")
    if kernel in TENSOR_CORE and facts["tensor_core"] < 1:
        wrong.append("no tensor core instruction")
    if kernel == "gemv" and (facts["barriers"] or not few):
        wrong.append(f"{facts['barriers']} barriers in the loop")
    # float32 activations lie in other lanes than the codes, 4 to a load and not 8
    if kernel == "gemv" and facts["shuffles"] and ("float32" not in case or facts["shuffles"] > 64):
        wrong.append(f"{facts['shuffles']} shuffles in the loop")
    elif facts["shuffles"] > 64 or facts["barriers"] > (64 if arch == "sm_100" else 32):
        wrong.append(f"{facts['shuffles']} shuffles and {facts['barriers']} barriers in the loop")
    return wrong


def test_the_report_holds_every_part_and_kernel() -> None:
    kernels = {tuple(name.split(" | ")[:2]) for name in REPORT}
    names = ("gemv", "gemm", "finish", "grouped_gemm", "quantized_gemm", "normalize", "decode_rows")
    assert {(arch, kernel) for arch in ARCHS for kernel in names} <= kernels


@pytest.mark.parametrize("arch", ARCHS)
def test_the_report_is_good(arch: str) -> None:
    wrong = {name: check(name, facts) for name, facts in REPORT.items() if name.startswith(f"{arch} ")}
    assert not {name: found for name, found in wrong.items() if found}


def test_what_is_wrong_is_seen() -> None:
    good = {"traps": False, "spills": 0, "shared": 0, "shared_limit": 1, "wide": 1, "narrow": 0, "tensor_core": 1,
            "shuffles": 0, "barriers": 0}  # fmt: skip
    assert not check("sm_80 | gemm | x", good)
    for change in ({"traps": True}, {"spills": 8}, {"shared": 2}, {"wide": 0}, {"narrow": 1}, {"tensor_core": 0},
                   {"shuffles": 200}, {"barriers": 65}):  # fmt: skip
        assert check("sm_80 | gemm | x", {**good, **change})
    assert check("sm_80 | gemv | x, M=1", {**good, "barriers": 1})


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.parametrize("arch", ARCHS)
def test_compiled_now_it_is_what_the_report_says(arch: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_report.py"), "--check", arch],
        capture_output=True, text=True, env=environment, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    now: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    assert len(now) >= 12
    changed = []
    for name, facts in now.items():
        changed += [f"{name}: {found}" for found in check(name, facts)]
        before = REPORT[name]
        for fact in ("registers", "shared", "per_weight"):
            if abs(facts[fact] - before[fact]) > max(0.1 * before[fact], 8 if fact == "registers" else 0.3):
                changed.append(f"{name}: {fact} {facts[fact]}, in the report {before[fact]}")
    assert not changed, "run `python bench/gpu_report.py` and look at what it changes:\n" + "\n".join(changed)


def test_on_paper_nothing_is_slower_than_float16() -> None:
    """The rooflines that follow from the report, which are those of the page."""
    import rooflines

    page = (ROOT / "docs" / "rooflines.md").read_text(encoding="utf-8")
    assert page == rooflines.page(REPORT), "run python bench/rooflines.py"
    lines = rooflines.rows(REPORT) + rooflines.codes_rows(REPORT) + rooflines.experts_rows(REPORT)
    assert len(lines) == 4 * (4 * 6 + 4 * 3 + 4) + 4
    slower = [line for line in lines if float(line.split("|")[-2]) < 0.995]
    # the page says so of float8 that tensor cores do not multiply
    decoded = [line for line in lines if "decoded" in line]
    assert len(decoded) == 8
    assert slower == decoded, "\n".join(slower)
