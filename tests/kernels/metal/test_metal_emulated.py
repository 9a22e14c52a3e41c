"""Every Metal kernel, its text unchanged, run on fibers with lanes in lockstep, against float64.

Never compiled by Apple's compiler: test_metal_device.py does that where there is an Apple GPU.
"""

from __future__ import annotations

import gpu_emulator
import pytest
import torch
from oracle import data, relative, wide
from row_weights import random_matrix
from tiled_weights import ACTIVATIONS
from torch import Tensor

from qcompile.kernels.layouts.rows import Rows, pack
from qcompile.kernels.metal import linear

pytestmark = pytest.mark.skipif(gpu_emulator.COMPILER is None, reason="needs a C++ compiler")
#: Relative to the norm of the product; half rounds the decoded weight in gemm.
BOUND = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "compile_source", gpu_emulator.compile_metal)


def packed(
    n: int, k: int, group: int, bits: int, kind: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    matrix = random_matrix(n, k, group, bits, kind, dtype)
    w: Rows = pack(matrix.codes, matrix.scale / 16, None, bits, group)
    if kind == "symmetric":
        return (w.codes, w.scale, None), matrix.value / 16
    zero = matrix.zero if kind == "affine" else matrix.zero / 16  # type: ignore[operator]
    return (w.codes, w.scale, zero), matrix.value / 16


#: One for each text that is compiled; between them every branch of the source.
VARIANTS = [
    (torch.float16, 4, "symmetric"),
    (torch.float16, 8, "affine"),
    (torch.float32, 4, "shift"),
    (torch.float32, 8, "symmetric"),
    (torch.bfloat16, 4, "affine"),
]
#: M, N, K, group: tails in every direction; groups that are no whole chunk; one row, one column.
SHAPES = [
    (1, 1, 1, 0), (1, 7, 7, 0), (1, 97, 193, 32), (1, 160, 97, 7),
    (9, 65, 31, 16), (33, 7, 160, 50), (35, 97, 193, 128), (64, 64, 64, 32),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "bits", "kind"), VARIANTS)
def test_against_float64(dtype: torch.dtype, bits: int, kind: str) -> None:
    for m, n, k, group in SHAPES:
        args, value = packed(n, k, group, bits, kind, dtype)
        x = data(m, k, dtype=dtype)
        y = linear.linear_rows(x, *args, None, bits, group, n)
        assert relative(y, wide(x) @ wide(value).T) < BOUND[dtype], (m, n, k, group)


@pytest.mark.parametrize("m", [2, 3, 4, 7, 8])
def test_a_few_rows(m: int) -> None:
    """The rows of x that gemv takes at once, and those beyond the last."""
    args, value = packed(21, 200, 40, 4, "affine", torch.float16)
    x, bias = data(m, 200, dtype=torch.float16), data(21)
    y = linear.linear_rows(x, *args, bias, 4, 40, 21)
    assert relative(y, wide(x) @ wide(value).T + wide(bias), wide(x) @ wide(value).T) < BOUND[torch.float16]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_epilogue(activation: str) -> None:
    args, value = packed(20, 64, 32, 8, "affine", torch.float32)
    x, bias, mul, add = data(9, 64) / 20, torch.randn(20), data(9, 20), data(9, 20)
    for rows in (1, 9):
        y = linear.linear_rows(x[:rows], *args, bias, 8, 32, 20, activation, mul[:rows], add[:rows])
        pre = x[:rows].double() @ value.T + bias
        want = ACTIVATIONS[activation](pre) * mul[:rows] + add[:rows]
        torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=2e-5)


def test_gate_siblings_and_what_is_not_contiguous() -> None:
    args, value = packed(40, 64, 32, 4, "affine", torch.float32)
    x, bias, mul = data(2, 3, 128)[..., ::2] / 20, torch.randn(40), data(3, 2, 20).transpose(0, 1)
    pre = x.double() @ value.T + bias
    y = linear.linear_rows(x, *args, bias, 4, 32, 20, "silu", mul, mul, True)
    want = torch.nn.functional.silu(pre[..., :20]) * pre[..., 20:] * mul + mul
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    parts = linear.linear_rows_split(x, *args, bias, 4, 32, [7, 33])
    assert [list(p.shape) for p in parts] == [[2, 3, 7], [2, 3, 33]] and all(p.is_contiguous() for p in parts)
    torch.testing.assert_close(torch.cat(parts, -1).double(), pre, rtol=1e-5, atol=1e-5)
    assert linear.linear_rows(x[:0], *args, bias, 4, 32, 40).shape == (0, 3, 40)
    y = linear.linear_rows(data(65)[1:], *args, None, 4, 32, 40)  # x starts where four elements cannot be read at once
    torch.testing.assert_close(y.double(), data(65)[1:].double() @ value.T, rtol=1e-5, atol=1e-4)


def test_nan_and_infinity_arrive() -> None:
    args, _ = packed(8, 64, 32, 4, "affine", torch.float32)
    x = torch.ones(9, 64)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    for rows in (1, 9):
        y = linear.linear_rows(x[:rows], *args, None, 4, 32, 8)
        assert y[0].isnan().all() and (rows == 1 or (not y[1].isfinite().any() and y[2:].isfinite().all()))
