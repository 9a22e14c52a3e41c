"""Linears that Inductor makes templates of, up to the generated code, on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile.kernels
from qcompile import inductor
from qcompile.kernels.triton.table import TABLE, choose, neighbours
from qcompile.kernels.triton.target import Target

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
TARGETS = [Target("sm_80", 108), Target("sm_89", 128), Target("sm_90", 132), Target("sm_100", 148), Target("gfx942", 304)]

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")


def lines(folder: Path, *arguments: str, interpret: bool = False) -> list[Any]:
    """What ``lowering_cases.py`` says, in a process of its own with caches of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *(p for p in sys.path if p)]), "PYTHONSAFEPATH": "1"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(SUPPORT / "lowering_cases.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@triton
def test_generated_programs_are_right_and_fused(tmp_path: Path) -> None:
    found = lines(tmp_path, "run", interpret=True)
    wrong = [f"{name}: {error:.1e}, allowed {bound:.0e}" for name, error, bound, *_ in found if not error <= bound]
    apart = [f"{name}: {kinds}, not {wanted}" for name, _, _, kinds, wanted, _ in found if kinds != wanted]
    silent = [name for name, *_, said in found if not said]
    assert not (wrong or apart or silent)
    assert len(found) >= 40


@triton
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_what_templates_compile_to(arch: str, tmp_path: Path) -> None:
    found = lines(tmp_path, "code", arch)
    assert len(found) >= 8
    for name, facts in found:
        assert not facts["spills"] and not facts["traps"] and not facts["narrow"], name
        assert facts["shared"] <= facts["shared_limit"], name
        assert facts["wide"] >= 1, name
        if name.startswith("M=1 "):
            assert not facts["barriers"] and not facts["shuffles"], name
        else:
            assert facts["tensor_core"] >= 1, name


@triton
def test_autotuning_has_few_choices_and_begins_with_the_tables(tmp_path: Path) -> None:
    found = lines(tmp_path, "choices")
    assert len(found) == 6
    for name, choices, first in found:
        assert 2 <= len(choices) <= 5, name
        assert all(part in choices[0].split(", ") for part in first), name
        assert len(set(choices)) == len(choices), name


@triton
def test_the_few_rows_of_the_cuda_kernel_stay_calls(tmp_path: Path) -> None:
    ((_, found),) = lines(tmp_path, "opaque")
    assert found == ["linear_planes_forward", "linear_planes_split_forward"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch)
@pytest.mark.parametrize("float32", [False, True])
def test_neighbours_are_few_and_others(target: Target, float32: bool) -> None:
    for most, _ in TABLE[target.family]:
        for bits in (2, 3, 4, 8):
            config, _ = choose(target, most or 5000, 4096, 4096, bits, float32)
            if config.way == "dense":
                continue
            tried = neighbours(target, config, bits, float32)
            assert 1 <= len(tried) <= 4 and config not in tried
            assert all(c.way == config.way and c.bn >= 1 and c.stages >= 2 for c in tried)


def test_a_template_s_text_is_part_of_what_caches_go_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(Path(str(qcompile.kernels.__file__)).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(inductor, "_folders", lambda: (folder,))

    def digest() -> bytes:
        inductor._source_digest.cache_clear()
        return bytes(inductor.CacheStamp().uuid())

    before = digest()
    for name in ("templates", "lowering", "decompose", "gemm", "table"):
        path = folder / "triton" / f"{name}.py"
        path.write_text(path.read_text(encoding="utf-8").replace(" + ", " - ", 1), encoding="utf-8")
        after = digest()
        assert after != before, name
        before = after
    monkeypatch.undo()
    inductor._source_digest.cache_clear()


def test_on_the_cpu_nothing_is_written_out() -> None:
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    qc = torch.ops.qcompile
    inductor.prepare()
    x, codes, scale = torch.randn(4, 128), torch.zeros(6, 32, dtype=torch.int16), torch.ones(6, 1)

    def program(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = qc.linear_planes_forward(x, codes, scale, None, None, 4, "int", 0, 6, "silu")
        return y, *qc.linear_planes_split_forward(x, codes, scale, None, None, 4, "int", 0, [2, 4])

    graph = make_fx(program, decomposition_table=select_decomp_table())(x, codes, scale).graph
    targets = [n.target for n in graph.nodes if n.op == "call_function"]
    assert targets[:2] == [qc.linear_planes_forward.default, qc.linear_planes_split_forward.default]
    compiled = torch.compile(program, fullgraph=True)
    with torch.no_grad():
        for got, want in zip(compiled(x, codes, scale), program(x, codes, scale), strict=True):
            assert torch.equal(got, want)
