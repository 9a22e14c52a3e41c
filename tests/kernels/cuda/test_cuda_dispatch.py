"""Which products come to the CUDA kernel: few rows through Triton's entry, and its own where Triton cannot run."""

from __future__ import annotations

import importlib
import importlib.util

import gpu_emulator
import pytest
import torch
from cuda_emulated import emulate
from oracle import data, relative, wide
from row_weights import Matrix, random_matrix
from torch import Tensor

from qcompile.kernels import Scheme, dispatch
from qcompile.kernels.cuda import linear
from qcompile.kernels.layouts.planes import Planes, pack
from qcompile.kernels.triton.table import CUDA_ROWS
from qcompile.kernels.triton.target import Target, pretend

T4, A100, MI300 = Target("sm_75", 40), Target("sm_80", 108), Target("gfx942", 304)


def test_its_own_entry_is_for_devices_without_triton() -> None:
    scheme = Scheme.parse("qint4/group=64/affine/float16")
    for target, dtype, name in (
        (T4, torch.float16, "cuda-planes"), (T4, torch.bfloat16, None), (A100, torch.float16, "triton-planes"),
        (MI300, torch.float16, "triton-planes"),
    ):  # fmt: skip
        with pretend(target):
            kernel, why = dispatch.choose("linear", "cuda", scheme, (64, 128), dtype)
            assert (kernel.name if kernel else None) == name, why
            assert name is not None or "sm_75 has no tensor cores for bfloat16" in why
    with pretend(T4):
        for text, reason in (
            ("qint4/group=48/affine/float16", "multiple of 32"),
            ("qint3/group=64/affine/float16", "4 or 8 bits"),
            ("qfloat8_e4m3fn/channel=0/symmetric/float32", "integer codes"),
        ):
            kernel, why = dispatch.choose("linear", "cuda", Scheme.parse(text), (64, 128), torch.float16)
            assert kernel is None and reason in why


@pytest.fixture
def weight() -> tuple[Planes, Matrix]:
    w = random_matrix(50, 160, 32, 4, "affine", torch.float16)
    return pack(w.codes, w.scale, w.zero, 4, 32), w


@pytest.mark.skipif(gpu_emulator.COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("module", ["cuda", "triton"])
def test_few_rows_are_its_own(
    module: str, weight: tuple[Planes, Matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the fallback's entry and through Triton's, with one emulated launch a product."""
    if module == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    entry = importlib.import_module(f"qcompile.kernels.{module}.linear")
    launches = []

    def counted(made: linear.Plan, tensors: list[Tensor], sizes: tuple[int, ...]) -> None:
        launches.append(sizes[0])
        emulate(made, tensors, sizes)

    monkeypatch.setattr(linear, "start", counted)
    monkeypatch.setattr(linear, "takes", lambda *_: True)
    planes, w = weight
    x = (data(2, CUDA_ROWS // 2, 160) / 100).half()
    want = wide(x) @ wide(w.value).T
    tensors = (planes.codes, planes.scale, planes.zero)
    y = entry.linear_planes(x, *tensors, None, 4, "int", 32, 50)
    assert relative(y, want) < 5e-4
    parts = entry.linear_planes_split(x, *tensors, None, 4, "int", 32, [17, 33])
    assert [list(p.shape) for p in parts] == [[2, 4, 17], [2, 4, 33]] and relative(torch.cat(parts, -1), want) < 5e-4
    assert launches == [8, 8, 8]


def test_what_it_does_not_take_is_decoded(weight: tuple[Planes, Matrix]) -> None:
    """The entry for devices without Triton, called here with tensors that no CUDA kernel can take."""
    planes, w = weight
    tensors = (planes.codes, planes.scale, planes.zero)
    x, bias, mul = data(70, 160) / 100, torch.randn(50), torch.randn(70, 25)
    pre = x.double() @ w.value.T + bias
    y = linear.linear_planes(x, *tensors, bias, 4, "int", 32, 25, "silu", mul, mul, True)
    want = torch.nn.functional.silu(pre[:, :25]) * pre[:, 25:] * mul + mul
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    parts = linear.linear_planes_split(x, *tensors, bias, 4, "int", 32, [17, 33])
    torch.testing.assert_close(torch.cat(parts, -1).double(), pre, rtol=1e-4, atol=1e-4)
    assert not linear.takes(x, planes.codes, 4, "int", 32)
