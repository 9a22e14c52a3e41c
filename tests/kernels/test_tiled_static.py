"""``linear_tiled_static``: int8 activations with one scale for all, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from oracle import data
from tiled_weights import KINDS, error, random_weight
from torch import Tensor

OPS = torch.ops.qcompile


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """The activations that the operator stands for, in float64."""
    return (x.double() / float(scale)).round().clamp(-127, 127) * float(scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_against_float64(isa: str, bits: int, kind: str) -> None:
    for n, k, group in [(97, 160, 32), (7, 193, 64), (33, 64, 0), (1, 1, 0)]:
        w, bias = random_weight(n, k, group, bits, kind), torch.randn(n)
        for m in (0, 1, 3, 7, 40):
            x = data(m, k)
            scale = x.abs().max() / 127 if m else torch.tensor(1.0)
            y = OPS.linear_tiled_static(x, scale, *w.args, bias, bits, group, n)
            assert y.shape == (m, n) and y.dtype == x.dtype
            if m:
                # The codes are exact but where a value lies half way between two.
                assert error(y, rounded(x, scale) @ w.matrix.T + bias, x, w.matrix) <= 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_views_and_a_range_that_is_too_small(isa: str, dtype: torch.dtype) -> None:
    w = random_weight(40, 96, 32, 4)
    x = data(96, 10).T.to(dtype)  # not contiguous
    scale = x.float().abs().max() / 127 / 3
    want = rounded(x.float(), scale) @ w.matrix.T
    y = OPS.linear_tiled_static(x, scale, *w.args, None, 4, 32, 40)
    assert y.dtype == dtype
    assert error(y, want, x.float(), w.matrix) <= max(2e-4, float(torch.finfo(dtype).eps))
    assert float((x.double() - rounded(x.float(), scale)).abs().max()) > 0.5 * float(x.abs().max())  # it did saturate


def test_infinity_saturates_and_nan_stays(isa: str) -> None:
    w = random_weight(20, 64, 32, 8)
    x = data(3, 64)
    x[0, 5], x[1, 7] = float("inf"), float("nan")
    scale = torch.tensor(0.05)
    y = OPS.linear_tiled_static(x, scale, *w.args, None, 8, 32, 20)
    assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all()
    want = rounded(x[[0, 2]], scale) @ w.matrix.T
    assert error(y[[0, 2]], want, x[[0, 2]].nan_to_num(posinf=6.35), w.matrix) <= 2e-4


def test_the_reference_says_the_same(isa: str) -> None:
    from qcompile.kernels.ops.linear_tiled_static import linear_tiled_static

    w = random_weight(50, 100, 48, 4, "shift")
    x, bias = data(9, 100), torch.randn(50)
    scale = x.abs().max() / 127
    want = linear_tiled_static(x, scale, *w.args, bias, 4, 48, 50)
    assert error(OPS.linear_tiled_static(x, scale, *w.args, bias, 4, 48, 50), want.double(), x, w.matrix) <= 2e-4


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_a_scale_that_is_none_is_refused(value: float) -> None:
    w = random_weight(20, 64, 32, 4)
    with pytest.raises((RuntimeError, ValueError), match="x_scale must be in"):
        OPS.linear_tiled_static(torch.randn(2, 64), torch.tensor(value), *w.args, None, 4, 32, 20)


def test_refusals_and_opcheck() -> None:
    w = random_weight(20, 64, 32, 4)
    x, scale = torch.randn(2, 64), torch.tensor(0.1)
    for bad in (torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)):
        with pytest.raises((RuntimeError, ValueError), match="float32 scalar"):
            OPS.linear_tiled_static(x, bad, *w.args, None, 4, 32, 20)
    with pytest.raises((RuntimeError, ValueError), match="codes must be"):
        OPS.linear_tiled_static(torch.randn(2, 65), scale, *w.args, None, 4, 32, 20)
    torch.library.opcheck(
        OPS.linear_tiled_static.default, (x, scale, *w.args, None, 4, 32, 20),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
