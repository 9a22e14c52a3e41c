"""The range that a scale covers, by method."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.eager.observers import METHODS, Observer
from qcompile.kernels import qfloat8, qfloat8_e5m2, qint8
from qcompile.kernels.dtypes import QType

QTYPES = [qint8, qfloat8, qfloat8_e5m2]
qtypes = pytest.mark.parametrize("qtype", QTYPES, ids=str)
methods = pytest.mark.parametrize("method", METHODS)


def _scale(method: str, batches: list[Tensor], qtype: QType = qint8, **options: float) -> float | None:
    observer = Observer(method, **options)  # type: ignore[arg-type]
    for batch in batches:
        observer.see(batch)
    return observer.scale(qtype)


def _squared_error(x: Tensor, scale: float, qtype: QType) -> float:
    steps = (x.double() / scale).clamp(qtype.qmin, qtype.qmax)
    codes = steps.float().to(qtype.dtype).double() if qtype.is_float else steps.round()
    return float(((codes * scale - x.double()) ** 2).mean())


@methods
@given(seed=st.integers(0, 10**6), exponent=st.integers(-20, 20), sizes=st.lists(st.integers(0, 300), max_size=4))
def test_every_range_lies_within_what_was_seen(method: str, seed: int, exponent: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, generator=generator) * 2.0**exponent for n in sizes]
    for qtype in QTYPES:
        scale = _scale(method, batches, qtype)
        if not any(sizes):
            assert scale is None
            continue
        assert scale is not None
        largest = max(float(b.abs().max()) for b in batches if b.numel())
        assert 0 < scale * qtype.qmax <= largest * (1 + 1e-6)


@given(seed=st.integers(0, 10**6), outlier=st.floats(1, 1000))
def test_order_of_the_methods(seed: int, outlier: float) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
    x[0] = x.abs().max() * outlier
    largest = _scale("minmax", [x])
    assert largest is not None
    for method in METHODS:
        scale = _scale(method, [x])
        assert scale is not None and scale <= largest * (1 + 1e-6)
    narrow, wide = (_scale("percentile", [x], percentile=p) for p in (90, 99.9))
    assert narrow is not None and wide is not None and narrow <= wide * (1 + 1e-6)


@methods
@qtypes
@given(factor=st.sampled_from([2.0**-30, 0.25, 4.0, 2.0**20]))
def test_scales_scale(method: str, qtype: QType, factor: float) -> None:
    batches = [torch.randn(512) for _ in range(3)]
    scale, other = _scale(method, batches, qtype), _scale(method, [b * factor for b in batches], qtype)
    assert scale is not None and other == pytest.approx(scale * factor, rel=1e-6)


def test_ema_and_minmax() -> None:
    batches = [torch.tensor([1.0, -2.0]), torch.tensor([-8.0]), torch.tensor([0.0, 4.0])]
    assert _scale("minmax", batches) == 8 / 127
    assert _scale("ema", batches, momentum=0.5) == (0.5 * (0.5 * 2 + 0.5 * 8) + 0.5 * 4) / 127
    assert _scale("ema", batches, momentum=0.0) == 4 / 127


def test_percentile_is_that_of_the_magnitudes() -> None:
    x = torch.randn(20000)
    for percent in (50, 90, 99, 99.9):
        scale = _scale("percentile", [x[:7000], x[7000:]], percentile=percent)
        assert scale is not None
        assert scale * 127 == pytest.approx(float(x.abs().double().quantile(percent / 100)), rel=0.02)
    assert _scale("percentile", [x], percentile=100) == pytest.approx(float(x.abs().max()) / 127)


@pytest.mark.parametrize("tail", ["normal", "laplace", "outlier"])
def test_mse_is_the_least_squared_error(tail: str) -> None:
    x = torch.randn(20000)
    if tail == "laplace":
        x = torch.distributions.Laplace(0, 1).sample((20000,))
    if tail == "outlier":
        x[:3] *= 50
    found, largest = _scale("mse", [x]), _scale("minmax", [x])
    assert found is not None and largest is not None
    best = min(_squared_error(x, largest * (1 - i / 100), qint8) for i in range(100))
    assert _squared_error(x, found, qint8) <= best * 1.05


def test_histogram_clips_a_lonely_outlier_and_keeps_a_uniform_range() -> None:
    x = torch.randn(50000)
    plain, spiked = _scale("histogram", [x]), _scale("histogram", [torch.cat([x, torch.tensor([500.0])])])
    assert plain is not None and spiked is not None and spiked * 127 < 50
    uniform = _scale("histogram", [torch.rand(50000)])
    assert uniform is not None and uniform * 127 > 0.9


@methods
@qtypes
def test_zeros_and_what_is_not_finite(method: str, qtype: QType) -> None:
    assert _scale(method, [torch.zeros(8)], qtype) == 1.0
    assert _scale(method, [torch.empty(0, 8)], qtype) is None
    assert _scale(method, [torch.full((4,), float("nan"))], qtype) is None
    x = torch.randn(64)
    dirty = torch.cat([x, torch.tensor([float("nan"), float("inf"), -float("inf")])])
    assert _scale(method, [dirty], qtype) == _scale(method, [x], qtype)
    tiny = _scale(method, [torch.full((4,), 1e-44)], qtype)
    assert tiny is not None and tiny > 0 and 1 / tiny < float("inf")


@methods
def test_one_value_far_above_the_first_batches(method: str) -> None:
    scale = _scale(method, [torch.full((100,), 1e-20), torch.full((100,), 1e20)])
    assert scale is not None and 0 < scale <= 1e20 / 127 * (1 + 1e-6)


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    x = torch.randn(512).to(dtype)
    assert _scale(method, [x]) == _scale(method, [x.float()])


def test_the_order_of_batches_does_not_matter_to_a_histogram() -> None:
    batches = [torch.randn(300) * f for f in (1.0, 2.0, 4.0)]
    for method in ("minmax", "percentile", "mse"):
        a, b = _scale(method, batches), _scale(method, batches[::-1])
        assert a is not None and b == pytest.approx(a, rel=0.02)
