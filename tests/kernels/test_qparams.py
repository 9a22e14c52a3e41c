"""Choosing scale and zero point: error bounds against the range found in numpy, and the edges."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from qcompile.kernels import PerChannel, PerGroup, QTensor, Scheme, qint4, qint8
from qcompile.kernels.qparams import choose

INTEGERS = [t for t in oracle.SCHEMES if not t.startswith("qfloat8")]
FLOATS = [t for t in oracle.SCHEMES if t.startswith("qfloat8")]


def _bound(x: oracle.Array, q: QTensor) -> dict[tuple[int, ...], float]:
    """The most that a value of each run may move: half a step, and what rounding the scale and shift leaves out."""
    qtype, mode, bound = q.scheme.qtype, q.scheme.mode, {}
    for key, run in oracle.runs(x, q.scheme).items():
        stored = float(q.scale[key])
        low, high = (run.min(), run.max()) if mode == "shift" else (min(run.min(), 0), max(run.max(), 0))
        exact = max(-low, high) / qtype.qmax if mode == "symmetric" else (high - low) / (qtype.levels - 1)
        moved = abs(float(q.zero[key]) - run.min()) if mode == "shift" and q.zero is not None else 0.0
        bound[key] = stored / 2 + qtype.levels * max(exact - stored, 0.0) + 2 * moved + 1e-6 * np.abs(run).max()
    return bound


@pytest.mark.parametrize("text", INTEGERS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 97), (16, 160), (9, 193)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_half_a_step(text: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = oracle.data(*shape, dtype=dtype)
    q = QTensor.quantize(x, Scheme.parse(text))
    error = np.abs(oracle.value(q) - oracle.wide(x))
    bound = _bound(oracle.wide(x), q)
    for key, run in oracle.runs(error, q.scheme).items():
        assert run.max() <= bound[key], key


@pytest.mark.parametrize("text", FLOATS)
def test_error_of_a_float_code_is_relative(text: str) -> None:
    x = oracle.data(16, 97)
    q = QTensor.quantize(x, Scheme.parse(text))
    want, got = oracle.wide(x), oracle.value(q)
    finfo = torch.finfo(q.scheme.qtype.dtype)
    step = oracle.each(q.scale, x.shape, q.scheme) * finfo.smallest_normal * finfo.eps
    assert np.all(np.abs(got - want) <= np.abs(want) * (finfo.eps / 2 + 2**-7) + step)
    assert np.abs(got).max() >= 0.9 * np.abs(want).max()


@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_all_zero_is_exactly_zero(text: str) -> None:
    x = oracle.data(6, 40)
    x[2], x[:, :16] = 0, 0
    for weight in (torch.zeros(6, 40), x):
        q = QTensor.quantize(weight, Scheme.parse(text))
        empty = oracle.sums(np.abs(oracle.wide(weight)), q.scheme) == 0
        assert np.all(oracle.wide(q.scale)[empty] == 1)
        assert not oracle.sums(np.abs(oracle.value(q)), q.scheme)[empty].any()


@pytest.mark.parametrize("mode", ["symmetric", "affine", "shift"])
@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -1e-3, 250.0])
def test_a_constant_is_kept(mode: str, value: float) -> None:
    for bits in (2, 4, 8):
        q = QTensor.quantize(torch.full((3, 20), value), Scheme.parse(f"qint{bits}/group=8/{mode}/float32"))
        np.testing.assert_allclose(oracle.value(q), value, rtol=1e-6)


@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_scale_has_the_shape_and_dtype_that_the_scheme_says(text: str) -> None:
    scheme = Scheme.parse(text)
    for shape in [(7, 97), (0, 8), (8, 0), (3, 1)]:
        scale, zero = choose(torch.ones(shape), scheme)
        assert scale.shape == scheme.scale_shape(shape) and scale.dtype == scheme.scale_dtype
        assert (zero is None) == (scheme.mode == "symmetric")
        if zero is not None:
            assert zero.shape == scale.shape
            assert zero.dtype == (torch.uint8 if scheme.mode == "affine" else scheme.scale_dtype)


@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_mse_clip_is_never_worse_and_helps_outliers(text: str) -> None:
    scheme = Scheme.parse(text)
    for seed in range(3):
        x = oracle.data(24, 161, seed=seed)
        worst = np.square(oracle.value(QTensor.quantize(x, scheme, "max")) - oracle.wide(x))
        best = np.square(oracle.value(QTensor.quantize(x, scheme, "mse")) - oracle.wide(x))
        assert np.all(oracle.sums(best, scheme) <= oracle.sums(worst, scheme) * (1 + 1e-5))
    if not scheme.qtype.is_float and scheme.qtype.bits <= 4:
        assert best.sum() < 0.98 * worst.sum()


def test_mse_clip_keeps_to_its_own_range_when_values_are_far_from_zero() -> None:
    x = 100 + oracle.data(8, 64)
    scheme = Scheme.parse("qint4/group=32/shift/float32")
    plain = np.square(oracle.value(QTensor.quantize(x, scheme)) - oracle.wide(x)).sum()
    clipped = np.square(oracle.value(QTensor.quantize(x, scheme, "mse")) - oracle.wide(x)).sum()
    assert clipped < 0.97 * plain


@pytest.mark.parametrize("mode", ["symmetric", "affine", "shift"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e30, 1e37])
def test_range_of_a_float32_scale(mode: str, magnitude: float) -> None:
    x = oracle.data(4, 64).clamp(-8, 8) * magnitude
    for text in (f"qint8/group=32/{mode}/float32", f"qint8/group=32/{mode}/bfloat16"):
        assert oracle.relative(QTensor.quantize(x, Scheme.parse(text)).dequantize(), oracle.wide(x)) < 0.02


def test_values_too_small_for_the_scale_dtype_become_the_smallest_scale() -> None:
    q = QTensor.quantize(torch.full((2, 8), 1e-9), Scheme.parse("qint8/channel=0/symmetric/float16"))
    assert q.scale.tolist() == [2.0**-24] * 2 and not q.dequantize().any()
    tiny = torch.full((2, 8), 1e-42)
    back = QTensor.quantize(tiny, Scheme.parse("qint8/channel=0/symmetric/float32")).dequantize()
    assert torch.isfinite(back).all() and back.abs().max() <= 1e-37


@pytest.mark.parametrize("mode", ["symmetric", "affine", "shift"])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_too_large_for_the_scale_dtype_raise(mode: str, sign: int) -> None:
    with pytest.raises(ValueError, match=r"does not fit in torch.float16; use a wider scale dtype"):
        QTensor.quantize(sign * torch.linspace(1e8, 2e8, 64), Scheme.parse(f"qint8/group=32/{mode}/float16"))
    huge = torch.tensor([1e300, -1e300], dtype=torch.float64)
    with pytest.raises(ValueError, match="does not fit"):
        QTensor.quantize(huge, Scheme.parse(f"qint8/tensor/{mode}/float32"))


def test_a_shift_too_large_for_the_scale_dtype_raises() -> None:
    # The range is narrow, so the scale fits; the lowest value, which is the zero point, does not.
    with pytest.raises(ValueError, match=r"does not fit in torch\.float16"):
        QTensor.quantize(1e5 + torch.rand(2, 32), Scheme.parse("qint8/group=32/shift/float16"))


@pytest.mark.parametrize("text", oracle.SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_raises(text: str, bad: float) -> None:
    x = oracle.data(5, 33)
    x[4, 32] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        QTensor.quantize(x, Scheme.parse(text))


def test_wrong_input() -> None:
    with pytest.raises(TypeError, match=r"floating point tensors .* torch.int32"):
        choose(torch.ones(4, dtype=torch.int32), Scheme(qint8))
    with pytest.raises(ValueError, match="unknown clip 'min'; allowed: max, mse, hqq"):
        choose(torch.ones(4), Scheme(qint8), "min")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis 1 does not fit"):
        choose(torch.ones(4), Scheme(qint8, PerChannel(1)))


def test_a_group_far_larger_than_the_row_takes_no_memory() -> None:
    x = oracle.data(4, 24)
    want = QTensor.quantize(x, Scheme(qint4, PerGroup(24)))
    got = QTensor.quantize(x, Scheme(qint4, PerGroup(1 << 60)))
    assert torch.equal(got.data, want.data) and torch.equal(got.dequantize(), want.dequantize())
    block = QTensor.quantize(x, Scheme.parse(f"qint4/block={1 << 60}x{1 << 60}/affine/float32"))
    whole = QTensor.quantize(x, Scheme.parse("qint4/tensor/affine/float32"))
    assert torch.equal(block.dequantize(), whole.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_zero_point_is_rounded_to_the_side_with_less_error(bits: int) -> None:
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(3))
    q = QTensor.quantize(x, Scheme.parse(f"qint{bits}/group=32/affine/float32"))
    top, plain, got = 2**bits - 1, 0.0, 0.0
    errors = oracle.runs(oracle.value(q) - oracle.wide(x), q.scheme)
    for key, run in oracle.runs(oracle.wide(x), q.scheme).items():
        scale = (run.max() - run.min()) / top
        zero = np.rint(-run.min() / scale)  # min-max with the zero point rounded to nearest
        nearest = np.square((np.clip(np.rint(run / scale) + zero, 0, top) - zero) * scale - run).sum()
        assert np.square(errors[key]).sum() <= nearest * (1 + 1e-4), key
        plain += nearest
        got += np.square(errors[key]).sum()
    assert bits < 4 or got < 0.99 * plain


@pytest.mark.parametrize("text", ["qint4/group=32/symmetric/float32", "qint4/group=32/affine/float32"])
def test_mse_fits_the_scale_to_its_codes(text: str) -> None:
    x = oracle.data(16, 160)
    q = QTensor.quantize(x, Scheme.parse(text), "mse")
    wanted = oracle.runs(oracle.wide(x), q.scheme)
    # The least-squares factor of what was decoded is 1 where nothing is left to gain from another scale.
    factors = [
        (run * wanted[key]).sum() / np.square(run).sum() for key, run in oracle.runs(oracle.value(q), q.scheme).items()
    ]
    assert np.median(np.abs(np.array(factors) - 1)) < 2e-3
