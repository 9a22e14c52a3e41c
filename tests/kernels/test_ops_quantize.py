from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme

ops = torch.ops.qcompile
STATIC = [
    "qint8/tensor/symmetric/float32",
    "qint8/channel=-1/affine/float32",
    "qint8/group=8/shift/bfloat16",
    "qfloat8_e4m3fn/tensor/symmetric/float32",
    "qfloat8_e4m3fnuz/channel=0/symmetric/float16",
]
DYNAMIC = ["qint8/group=33/symmetric/float32", "qint8/group=8/symmetric/bfloat16",
           "qfloat8_e4m3fn/group=33/symmetric/float32", "qfloat8_e5m2/group=16/symmetric/float32"]  # fmt: skip
VIEWS = {"plain": lambda x: x, "transposed": lambda x: x.t().contiguous().t(), "empty": lambda x: x[:0]}


@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_dequantize(text: str) -> None:
    q = QTensor.quantize(oracle.data(6, 33), Scheme.parse(text))
    for dtype in (torch.float32, torch.bfloat16):
        args = (q.data, q.scale, q.zero, text, [6, 33], dtype)
        oracle.opcheck(ops.dequantize, args)
        assert oracle.relative(ops.dequantize(*args), oracle.value(q)) < oracle.TOLERANCE[dtype]


def test_dequantize_takes_codes_in_any_memory_order() -> None:
    q = QTensor.quantize(oracle.data(6, 33), Scheme.parse("qint8/channel=0/symmetric/float32"))
    args = (q.data.t().contiguous().t(), q.scale, None, str(q.scheme), [6, 33], torch.float32)
    oracle.opcheck(ops.dequantize, args)
    assert torch.equal(ops.dequantize(*args), q.dequantize())


@pytest.mark.parametrize("text", STATIC)
@pytest.mark.parametrize("view", VIEWS)
def test_quantize(text: str, view: str) -> None:
    scheme = Scheme.parse(text)
    calibration = QTensor.quantize(oracle.data(6, 33, seed=1), scheme)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = VIEWS[view](oracle.data(6, 33, dtype=dtype))
        q = calibration if len(x) else QTensor.quantize(x.float(), scheme)
        args = (x, q.scale, q.zero, text)
        oracle.opcheck(ops.quantize, args)
        codes = ops.quantize(*args)
        assert codes.dtype == scheme.code_dtype and codes.shape == x.shape
        again = QTensor(codes, q.scale, q.zero, scheme, tuple(x.shape))
        low, high = _limits(q, x)
        step = oracle.each(q.scale, x.shape, scheme)
        want = oracle.wide(x).clip(low, high)
        room = np.abs(want) * 0.13 + step * 2**-6 if scheme.qtype.is_float else step * 0.51 + np.abs(low) * 1e-6
        assert np.all(np.abs(oracle.value(again) - want) <= room)


def _limits(q: QTensor, x: torch.Tensor) -> tuple[oracle.Array, oracle.Array]:
    """The lowest and the highest value that each element's codes can stand for."""
    scale = oracle.each(q.scale, x.shape, q.scheme)
    if q.zero is None:
        return scale * q.scheme.qtype.qmin, scale * q.scheme.qtype.qmax
    zero, top = oracle.each(q.zero, x.shape, q.scheme), q.scheme.qtype.levels - 1
    return (-zero * scale, (top - zero) * scale) if q.scheme.mode == "affine" else (zero, zero + top * scale)


@pytest.mark.parametrize("text", DYNAMIC)
@pytest.mark.parametrize("view", VIEWS)
def test_quantize_dynamic(text: str, view: str) -> None:
    scheme = Scheme.parse(text)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = VIEWS[view](oracle.data(6, 33, dtype=dtype))
        oracle.opcheck(ops.quantize_dynamic, (x, text))
        codes, scale = ops.quantize_dynamic(x, text)
        q = QTensor(codes, scale, None, scheme, tuple(x.shape))
        want, step = oracle.wide(x), oracle.each(scale, x.shape, scheme)
        # A scale in bfloat16 may be a 256th too small for the largest value.
        room = np.abs(want) * (0.13 if scheme.qtype.is_float else 2**-8) + step * 0.51
        assert np.all(np.abs(oracle.value(q) - want) <= room)
        assert oracle.relative(q.dequantize(), want) < (0.1 if scheme.qtype.is_float else 0.02)


@pytest.mark.parametrize("shape", [(33,), (2, 3, 33), (1, 1), (5, 0), (0, 4)])
def test_quantize_dynamic_of_any_shape(shape: tuple[int, ...]) -> None:
    x = oracle.data(*shape)
    for group in (1, 16, 1 << 60):
        text = f"qint8/group={group}/symmetric/float32"
        oracle.opcheck(ops.quantize_dynamic, (x, text))
        codes, scale = ops.quantize_dynamic(x, text)
        q = QTensor(codes, scale, None, Scheme.parse(text), shape)
        assert oracle.relative(q.dequantize(), oracle.wide(x)) < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quantize_dynamic_does_not_hide_what_is_not_finite(bad: float) -> None:
    x = oracle.data(4, 16)
    x[2, 5] = bad
    codes, scale = ops.quantize_dynamic(x, "qint8/group=16/symmetric/float32")
    value = QTensor(codes, scale, None, Scheme.parse("qint8/group=16/symmetric/float32"), (4, 16)).dequantize()
    assert not torch.isfinite(value[2]).any() and torch.isfinite(value[[0, 1, 3]]).all()


def test_a_row_of_zeros_stays_zero() -> None:
    codes, scale = ops.quantize_dynamic(torch.zeros(2, 8), "qint8/group=8/symmetric/float16")
    assert not codes.any() and scale.tolist() == [[1.0], [1.0]]


def test_nan_stays_nan_in_float8() -> None:
    x = torch.tensor([1.0, float("nan")])
    for name in ("qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2"):
        codes = ops.quantize(x, torch.tensor(1.0), None, f"{name}/tensor/symmetric/float32")
        assert codes.float().isnan().tolist() == [False, True]


def test_wrong_input() -> None:
    x, one = torch.ones(2, 8), torch.tensor(1.0)
    with pytest.raises(ValueError, match="quantized to 8 bits"):
        ops.quantize(x, one, None, "qint4/tensor/symmetric/float32")
    with pytest.raises(ValueError, match="quantized to 8 bits"):
        ops.quantize_dynamic(x, "qint4/group=8/symmetric/float32")
    with pytest.raises(ValueError, match="has scale of shape"):
        ops.quantize(x, torch.ones(8), None, "qint8/tensor/symmetric/float32")
    with pytest.raises(ValueError, match="has scale of shape"):
        ops.quantize(x, one.half(), None, "qint8/tensor/symmetric/float32")
    with pytest.raises(ValueError, match="needs a zero point"):
        ops.quantize(x, one, None, "qint8/tensor/affine/float32")
    with pytest.raises(ValueError, match="takes no zero point"):
        ops.quantize(x, one, one, "qint8/tensor/symmetric/float32")
    with pytest.raises(TypeError, match="float tensor"):
        ops.quantize(x.int(), one, None, "qint8/tensor/symmetric/float32")
    with pytest.raises(TypeError, match="float tensor"):
        ops.quantize_dynamic(x.int(), "qint8/group=8/symmetric/float32")
    with pytest.raises(ValueError, match="is symmetric"):
        ops.quantize_dynamic(x, "qint8/group=8/affine/float32")
    with pytest.raises(ValueError, match="group granularity"):
        ops.quantize_dynamic(x, "qint8/tensor/symmetric/float32")
    with pytest.raises(ValueError, match="scalar"):
        ops.quantize_dynamic(x[0, 0], "qint8/group=8/symmetric/float32")
    with pytest.raises(ValueError, match="not a quantization scheme"):
        ops.quantize(x, one, None, "int8")
    with pytest.raises(ValueError, match="has data of shape"):
        ops.dequantize(x.to(torch.int8), one, None, "qint8/tensor/symmetric/float32", [2, 9], torch.float32)


def test_there_is_no_gradient_and_it_is_said() -> None:
    x, scale = torch.ones(2, 8, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="qcompile::quantize_dynamic has no gradient"):
        ops.quantize_dynamic(x, "qint8/group=8/symmetric/float32")[1].sum().backward()
    with pytest.raises(RuntimeError, match="qcompile::quantize has no gradient"):
        ops.quantize(x, scale[0].detach(), None, "qfloat8/tensor/symmetric/float32").float().sum().backward()
    codes = torch.ones(2, 8, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="qcompile::dequantize has no gradient"):
        ops.dequantize(codes, scale, None, "qint8/channel=0/symmetric/float32", [2, 8], torch.float32).sum().backward()
