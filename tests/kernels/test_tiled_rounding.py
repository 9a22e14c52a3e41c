"""``linear_tiled`` with ``x_scale`` and ``per_row``: int8 activations with one scale for all or one a row, on every
instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import data
from tiled_weights import KINDS, error, random_weight
from torch import Tensor

from qcompile.kernels.ops.linear_tiled import linear_tiled as reference

OPS = torch.ops.qcompile
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def rounded(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """The activations that the operator stands for, in float64; no scale: one a row."""
    wide = x.double()
    step = wide.abs().amax(-1, keepdim=True) / 127 if scale is None else scale.double()
    return (wide / step).round().clamp(-127, 127) * step


def call(x: Tensor, w: Any, bias: Tensor | None, bits: int, group: int, n: int, **rounding: Any) -> Tensor:
    return OPS.linear_tiled(x, *w.args, bias, bits, group, n, **rounding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("way", ["tensor", "row"])
def test_against_float64(isa: str, bits: int, kind: str, way: str) -> None:
    for n, k, group in [(97, 160, 32), (7, 193, 64), (33, 64, 0), (1, 1, 0)]:
        w, bias = random_weight(n, k, group, bits, kind), torch.randn(n)
        for m in (0, 1, 3, 7, 40):
            x = data(m, k)
            scale = None if way == "row" else x.abs().max() / 127 if m else torch.tensor(1.0)
            rounding = {"per_row": True} if scale is None else {"x_scale": scale}
            y = call(x, w, bias, bits, group, n, **rounding)
            assert y.shape == (m, n) and y.dtype == x.dtype
            if m:
                # The codes are exact but where a value lies half way between two.
                assert error(y, rounded(x, scale) @ w.matrix.T + bias, x, w.matrix) <= 2e-4


def test_sums_that_would_not_fit_32_bits(isa: str) -> None:
    k = 70_000  # 255 * 127 * k > 2^31
    w = random_weight(3, k, 0, 8, "symmetric")
    codes, scale, zero = w.args
    codes = torch.full_like(codes, 255)
    x = torch.rand(2, k) + 127
    y = OPS.linear_tiled(x, codes, scale, zero, None, 8, 0, 3, x_scale=torch.tensor(1.0))
    want = 127 * 127.0 * k * scale.flatten()[:3].double()  # (255 - 128) * 127, k times
    assert torch.allclose(y.double(), want.expand(2, 3), rtol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_views_and_a_range_that_is_too_small(isa: str, dtype: torch.dtype) -> None:
    w = random_weight(40, 96, 32, 4)
    x = data(96, 10).T.to(dtype)  # not contiguous
    scale = x.float().abs().max() / 127 / 3
    want = rounded(x.float(), scale) @ w.matrix.T
    y = call(x, w, None, 4, 32, 40, x_scale=scale)
    assert y.dtype == dtype
    assert error(y, want, x.float(), w.matrix) <= max(2e-4, float(torch.finfo(dtype).eps))
    assert float((x.double() - rounded(x.float(), scale)).abs().max()) > 0.5 * float(x.abs().max())  # it did saturate


def test_infinity_saturates_and_nan_stays(isa: str) -> None:
    w = random_weight(20, 64, 32, 8)
    x = data(3, 64)
    x[0, 5], x[1, 7] = float("inf"), float("nan")
    scale = torch.tensor(0.05)
    y = call(x, w, None, 8, 32, 20, x_scale=scale)
    assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all()
    want = rounded(x[[0, 2]], scale) @ w.matrix.T
    assert error(y[[0, 2]], want, x[[0, 2]].nan_to_num(posinf=6.35), w.matrix) <= 2e-4
    y = call(x, w, None, 8, 32, 20, per_row=True)
    assert torch.isnan(y[:2]).all() and torch.isfinite(y[2]).all()


def test_rows_of_zeros(isa: str) -> None:
    w, bias = random_weight(20, 64, 32, 4), torch.randn(20)
    x = data(3, 64)
    x[1] = 0
    assert torch.equal(call(x, w, bias, 4, 32, 20, per_row=True)[1], bias)


@pytest.mark.parametrize("way", ["tensor", "row"])
def test_the_epilogue_and_siblings(isa: str, way: str) -> None:
    w, x = random_weight(48, 100, 48, 4, "shift"), data(9, 100)
    scale = x.abs().max() / 127
    rounding: dict[str, Any] = {"per_row": True} if way == "row" else {"x_scale": scale}
    bias, mul, add = torch.randn(48), data(9, 48), data(9, 48)
    args = (x, *w.args, bias, 4, 48, 48, "silu", mul, add)
    assert torch.allclose(OPS.linear_tiled(*args, **rounding), reference(*args, **rounding), rtol=1e-3, atol=1e-2)
    parts = OPS.linear_tiled_split(x, *w.args, bias, 4, 48, [16, 32], **rounding)
    whole = OPS.linear_tiled(x, *w.args, bias, 4, 48, 48, **rounding)
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_a_scale_that_is_none_is_refused(value: float) -> None:
    w = random_weight(20, 64, 32, 4)
    with pytest.raises((RuntimeError, ValueError), match="x_scale must be in"):
        call(torch.randn(2, 64), w, None, 4, 32, 20, x_scale=torch.tensor(value))


def test_refusals_and_opcheck() -> None:
    w = random_weight(20, 64, 32, 4)
    x, scale = torch.randn(2, 64), torch.tensor(0.1)
    for bad in (torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)):
        with pytest.raises((RuntimeError, ValueError), match="float32 scalar"):
            call(x, w, None, 4, 32, 20, x_scale=bad)
    for two in ({"x_scale": scale, "per_row": True}, {"exact": True, "x_scale": scale}, {"exact": True, "per_row": True}):
        with pytest.raises((RuntimeError, ValueError), match="give one of"):
            call(x, w, None, 4, 32, 20, **two)
        with pytest.raises((RuntimeError, ValueError), match="give one of"):
            OPS.linear_tiled_split(x, *w.args, None, 4, 32, [4, 16], **two)
    with pytest.raises(ValueError, match="put fake_quantize before"):
        call(x.requires_grad_(), w, None, 4, 32, 20, x_scale=scale)
    for rounding in ({"x_scale": scale}, {"per_row": True}):
        torch.library.opcheck(
            OPS.linear_tiled_forward.default, (x.detach(), *w.args, None, 4, 32, 20), rounding,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
