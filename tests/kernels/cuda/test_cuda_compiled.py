"""The CUDA kernel compiled for each architecture, warnings as errors: registers, spills, shared memory, machine code."""

from __future__ import annotations

from pathlib import Path

import pytest
import sass
import torch

from qcompile.kernels.cuda import build, linear

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs NVRTC (cuda-bindings, nvidia-cuda-nvrtc) or nvcc")
ARCHITECTURES = (75, 80, 86, 89, 90, 100)
#: What a block may have of shared memory without asking, and a thread of registers at 256 threads, on all of these.
SHARED, REGISTERS = 48 << 10, 255


def plan(
    m: int, bits: int, dtype: torch.dtype, kind: int, *, glu: bool = False, group: int = 128, n: int = 8192
) -> linear.Plan:
    x, scale = torch.zeros(m, 8192, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    zero = (None, scale.to(torch.uint8), scale)[kind]
    return linear.plan(x, n, scale, zero, scale, bits, group, "silu" if glu else "none", glu=glu)


def variants() -> list[linear.Plan]:
    """Between them: each M, both widths and dtypes, each zero point, groups of one run, of a block, of a row."""
    half, brain = torch.float16, torch.bfloat16
    return [
        plan(1, 4, half, 0),
        plan(8, 4, half, 1, group=32),
        plan(8, 4, brain, 1, n=128256),
        plan(16, 4, half, 1, n=128256),
        plan(64, 4, half, 1, group=32),
        plan(64, 8, brain, 2),
        plan(1, 8, half, 1, group=0),
        plan(8, 4, half, 2, glu=True),
        plan(64, 8, half, 1, glu=True),
    ]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiles_without_spills(capability: int) -> None:
    # sm_86 and sm_89 differ from sm_80 in what the assembler knows of their latencies
    for made in variants()[:: 3 if capability in (86, 89) else 1]:
        if dict(made.definitions)["QC_BF16"] and capability < 80:
            continue
        compiled = build.compile_source(made.source, build.headers(), capability)
        found = build.resources(compiled.log)
        assert found.spilled == 0 and found.registers <= REGISTERS and found.shared <= SHARED, (made.definitions, found)


@pytest.mark.skipif(sass.disassembler() is None, reason="needs nvdisasm (of the CUDA toolkit, or of Triton's wheel)")
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability: int) -> None:
    """Weights come 128 bits at a time past L1, tensor cores multiply, nothing goes through local memory or is shuffled."""
    for made in variants()[1:4]:
        names = sass.instructions(build.compile_source(made.source, build.headers(), capability).code)
        tiles = dict(made.definitions)["QC_TILES"]
        streamed = [n for n in names if n.startswith("LDG") and "128" in n and "CONSTANT" in n and "NA" in n.split(".")]
        products = [n for n in names if n.startswith("HMMA.16816.F32")]
        # twice: before the loop, and in it one block ahead
        assert len(streamed) == 2 * 2 * tiles, [n for n in names if n.startswith("LDG")]
        assert len(products) % (8 * tiles * dict(made.definitions)["QC_COLUMNS"]) == 0 and products
        assert not any(n.startswith(("LDL", "STL", "SHFL", "I2F")) for n in names)


def test_what_the_compiler_refuses_is_said() -> None:
    with pytest.raises(build.BuildError, match="unused"):
        build.compile_source("__global__ void f() { int unused; }", {}, 80)
    with pytest.raises(build.BuildError, match="70"):
        build.compile_source(plan(1, 4, torch.float16, 0).source, build.headers(), 70)


def test_the_disk_keeps_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    source = 'extern "C" __global__ void f(int* p) { *p = 1; }'
    code = build.binary(source, 80)
    assert code[:4] == b"\x7fELF"
    (file,) = (tmp_path / "cache").iterdir()
    assert file.read_bytes() == code
    monkeypatch.setattr(build, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert build.binary(source, 80) == code
    monkeypatch.undo()
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    assert build.binary(source, 90) != code and len(list((tmp_path / "cache").iterdir())) == 2


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_nvrtc", lambda: None)
    monkeypatch.setattr(build, "_nvcc", lambda: None)
    assert build.compiler() is None
    with pytest.raises(build.BuildError, match="no CUDA compiler: NVRTC comes with"):
        build.binary("", 80)


def test_resources_are_read_from_the_log() -> None:
    log = "ptxas info : 0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\nUsed 40 registers, 2048 bytes smem"
    assert build.resources(log) == build.Resources(40, 12, 2048)
    with pytest.raises(ValueError, match="says nothing"):
        build.resources("")
