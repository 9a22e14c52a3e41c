"""Optimizers and the functions for single tensors, in Quanto's calls and in ours."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.eager.functional import absmax_scale, quantize_activation, quantize_weight
from qcompile.eager.optimizers import (
    AbsmaxOptimizer,
    AffineOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    MseOptimizer,
    Optimizer,
    SymmetricOptimizer,
    optimizer_named,
)
from qcompile.kernels import QTensor, QType, Scheme, qfloat8_e4m3fn, qint2, qint4, qint8
from qcompile.kernels.qparams import choose

NAMES = ["max", "mse", "hqq"]
INTEGERS = [t for t in oracle.SCHEMES if not t.startswith("qfloat8")]


class Absolute(SymmetricOptimizer):
    """A user's own: the largest absolute value."""

    def optimize(self, base: Tensor, qtype: QType, axis: int | None = None) -> Tensor:
        if axis is None:
            return base.abs().max() / qtype.qmax
        return base.abs().amax(1 if axis == 0 else 0, keepdim=True) / qtype.qmax


class Range(AffineOptimizer):
    """A user's own, with Quanto's sign: a value is ``scale * code - shift``."""

    def optimize(self, base: Tensor, qtype: QType, axis: int) -> tuple[Tensor, Tensor]:
        at = 1 if axis == 0 else 0
        low, high = base.amin(at, keepdim=True), base.amax(at, keepdim=True)
        return (high - low) / (qtype.levels - 1), -low


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_an_object_does_what_its_name_does(name: str, text: str) -> None:
    scheme, x = Scheme.parse(text), oracle.data(9, 161)
    if name == "hqq" and scheme.qtype.is_float:
        with pytest.raises(ValueError, match="integer dtypes"):
            optimizer_named(name).qparams(x, scheme)
        return
    want = QTensor.quantize(x, scheme, name)  # type: ignore[arg-type]
    scale, zero = optimizer_named(name).qparams(x, scheme)
    assert scale.dtype == scheme.scale_dtype and scale.shape == scheme.scale_shape(x.shape)
    for got in (QTensor.from_qparams(x, scale, zero, scheme), QTensor.quantize(x, scheme, optimizer_named(name))):
        assert torch.equal(got.dequantize(), want.dequantize())


@pytest.mark.parametrize("text", INTEGERS)
def test_a_users_own_serves_every_granularity(text: str) -> None:
    scheme, x = Scheme.parse(text), oracle.data(9, 161)
    own: Optimizer = Absolute() if scheme.mode == "symmetric" else Range()
    q = QTensor.quantize(x, scheme, own)
    plain = QTensor.quantize(x, scheme)
    error, best = (float((value.dequantize() - x).norm()) for value in (q, plain))
    # The same range as ours but for how an affine zero point is rounded.
    assert error <= 1.25 * best
    if scheme.mode != "affine" and scheme.scale_dtype == torch.float32:
        torch.testing.assert_close(q.scale, plain.scale, rtol=1e-6, atol=0)


def test_a_users_own_that_has_qparams_alone() -> None:
    class Own:
        def qparams(self, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
            return choose(2 * weight, scheme, "max")

    x, scheme = oracle.data(3000, 128), Scheme.parse("qint8/channel=0/symmetric/float32")
    assert x.numel() > 1 << 18
    assert torch.equal(QTensor.quantize(x, scheme, Own()).scale, choose(2 * x, scheme)[0])


@pytest.mark.parametrize("dtype", [qint2, qint4])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("name", NAMES)
def test_quantos_call(dtype: QType, axis: int, group_size: int | None, name: str) -> None:
    x = oracle.data(48, 96)
    optimizer = optimizer_named(name)
    assert isinstance(optimizer, AffineOptimizer)
    scale, shift = optimizer(x, dtype, axis, group_size)
    runs = x if axis == 0 else x.t()
    runs = runs.reshape(-1, group_size or runs.shape[1])
    assert scale.shape == shift.shape == ((len(runs), 1) if axis == 0 else (1, len(runs)))
    column, less = scale.reshape(-1, 1), shift.reshape(-1, 1)
    value = (((runs + less) / column).round().clamp(0, dtype.levels - 1) * column) - less
    got = quantize_weight(x, dtype, axis, scale, shift, group_size)
    assert got.shape == x.shape and got.scheme.mode == "shift"
    want = value.reshape(x.shape) if axis == 0 else value.reshape(x.t().shape).t()
    torch.testing.assert_close(got.dequantize(), want, rtol=1e-5, atol=1e-6)
    found = quantize_weight(x, dtype, axis, group_size=group_size, optimizer=name)
    # Sums over runs that lie otherwise in memory are rounded otherwise, and the solver may part its ways there.
    error, other = (float((q.dequantize() - x).norm()) for q in (found, got))
    assert abs(error - other) < (0.01 if name == "hqq" else 1e-6) * error
    # A zero point in code units makes zero exact.
    scale, code = optimizer(x, dtype, axis, group_size, zeropoint=True)
    assert code.dtype == torch.uint8 and int(code.max()) < dtype.levels
    x[0, 0] = 0
    assert float(quantize_weight(x, dtype, axis, scale, code, group_size).dequantize()[0, 0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_absmax(dtype: torch.dtype) -> None:
    x = oracle.data(7, 5, 3, dtype=dtype)
    wide = x.float().abs()
    for axis, shape, top in ((None, (), wide.max()), (0, (7, 1, 1), wide.amax((1, 2))), (-1, (1, 1, 3), wide.amax((0, 1)))):
        scale = absmax_scale(x, "qint8", axis)
        assert scale.shape == shape and scale.dtype == dtype
        torch.testing.assert_close(scale.reshape(-1), (top / 127).to(dtype).reshape(-1))
        assert torch.equal(AbsmaxOptimizer()(x, qint8, axis), scale)
    assert float(absmax_scale(0 * x)) == 1
    # An axis of one index is the whole tensor.
    assert absmax_scale(x[:1], axis=0).numel() == 1
    torch.testing.assert_close(absmax_scale(x, "float8").float(), (wide.max() / 448).to(dtype).float())


def test_eight_bits_are_symmetric_unless_a_shift_is_given() -> None:
    x = oracle.data(6, 40)
    q = quantize_weight(x, "int8")
    assert str(q.scheme) == "qint8/channel=0/symmetric/float32"
    assert torch.equal(quantize_weight(x, qint8, 0, absmax_scale(x, qint8, 0)).data, q.data)
    assert str(quantize_weight(x.bfloat16(), "qfloat8", -1).scheme) == "qfloat8_e4m3fn/channel=-1/symmetric/bfloat16"
    scale, shift = MaxOptimizer()(x, qint8, 0)
    assert quantize_weight(x, qint8, 0, scale, shift).scheme.mode == "shift"
    assert quantize_weight(x, qint8, optimizer=Range()).scheme.mode == "shift"
    assert quantize_weight(x, qint4, zeropoint=True).scheme.mode == "affine"
    # The last group may be short where groups lie along rows.
    assert quantize_weight(x, qint4, group_size=16).scale.shape == (6, 3)


def test_activations() -> None:
    x = oracle.data(2, 3, 5)
    x[0, 0, 0], x[1, 2, 4] = 100, -100
    q = quantize_activation(x, "qint8", torch.tensor([0.1]))
    assert q.scale.shape == () and q.shape == (2, 3, 5)
    torch.testing.assert_close(q.dequantize(), (x / 0.1).round().clamp(-128, 127) * 0.1)
    assert q.codes().max() == 127 and q.codes().min() == -128
    with pytest.raises(ValueError, match=r"8 bits \(qint8, qfloat8_e4m3fn, .*\), got qint4"):
        quantize_activation(x, qint4, torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"one scale for all of it, got a scale of shape \[3\]"):
        quantize_activation(x, qint8, torch.ones(3))
    with pytest.raises(ValueError, match="finite and above zero"):
        quantize_activation(x, qint8, torch.tensor(0.0))
    with pytest.raises(TypeError, match="only floating point"):
        quantize_activation(x.int(), qint8, torch.tensor(0.1))


def test_names() -> None:
    kinds = {"max": MaxOptimizer, "absmax": AbsmaxOptimizer, "mse": MseOptimizer, "hqq": HqqOptimizer}
    for name, kind in kinds.items():
        assert type(optimizer_named(name)) is kind
    own = Range()
    assert optimizer_named(own) is own
    with pytest.raises(ValueError, match="unknown optimizer 'best'; allowed: 'max', 'absmax', 'mse', 'hqq' or an Optimizer"):
        optimizer_named("best")
    with pytest.raises(TypeError, match=r"got the class HqqOptimizer; write HqqOptimizer\(\)"):
        optimizer_named(HqqOptimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got 3 of type int"):
        optimizer_named(3)  # type: ignore[arg-type]
    assert repr(HqqOptimizer(iters=5)) == "HqqOptimizer(lp_norm=0.7, beta=10.0, kappa=1.01, iters=5)"


def test_hqq_has_settings() -> None:
    x, scheme = oracle.data(32, 128), Scheme.parse("qint2/group=64/shift/float32")
    errors = {}
    for iters in (1, 20):
        scale, zero = HqqOptimizer(iters=iters).qparams(x, scheme)
        errors[iters] = float((QTensor.from_qparams(x, scale, zero, scheme).dequantize() - x).norm())
    assert errors[20] < errors[1]
    with pytest.raises(ValueError, match=r"lp_norm .* above 0 and at most 1, got 2"):
        HqqOptimizer(lp_norm=2)


def test_an_optimizer_without_zero_points_prefers_the_symmetric_mode() -> None:
    assert AbsmaxOptimizer().preferred_mode(qint4) == "symmetric"
    assert HqqOptimizer().preferred_mode(qint4) is None and MaxOptimizer().preferred_mode(qint8) is None


def test_wrong_pairs() -> None:
    x = oracle.data(6, 40)
    for wrong in (1, 2, None, True):
        with pytest.raises(ValueError, match=r"axis must be 0 \(first axis\) or -1 \(last axis\), got"):
            quantize_weight(x, qint4, wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="axis must be"):
            MaxOptimizer()(x, qint4, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown quantized dtype 'int7'; allowed: qint2, qint3"):
        quantize_weight(x, "int7")
    with pytest.raises(ValueError, match=r"group_size must divide the 40 elements of each index of axis 0 .* got 16"):
        MaxOptimizer()(x, qint4, 0, 16)
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"group"):
            quantize_weight(x, qint4, group_size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs one; take an AffineOptimizer"):
        Absolute().qparams(x, Scheme.parse("qint4/group=8/affine/float16"))
    with pytest.raises(ValueError, match="has none; take a SymmetricOptimizer"):
        Range().qparams(x, Scheme.parse("qint8/channel=0/symmetric/float32"))
    with pytest.raises(ValueError, match="MaxOptimizer is for integer dtypes, got qfloat8_e4m3fn"):
        MaxOptimizer()(x, qfloat8_e4m3fn, 0)
    with pytest.raises(ValueError, match="a scale or an optimizer, not both"):
        quantize_weight(x, qint8, 0, torch.ones(6), optimizer="max")
    with pytest.raises(ValueError, match="a shift without a scale"):
        quantize_weight(x, qint4, shift=torch.ones(6))
    with pytest.raises(ValueError, match="shift cannot be given for qfloat8_e4m3fn"):
        quantize_weight(x, "qfloat8", 0, torch.ones(6), torch.ones(6))
    with pytest.raises(ValueError, match=r"scale must have 6 elements .* got \[5\]"):
        quantize_weight(x, qint8, 0, torch.ones(5))
    with pytest.raises(ValueError, match="a code of qint4, from 0 to 15"):
        quantize_weight(x, qint4, 0, torch.ones(6), torch.full((6,), 16))
    with pytest.raises(ValueError, match="finite and above zero"):
        quantize_weight(x, qint8, 0, torch.zeros(6))
    with pytest.raises(TypeError, match=r"only floating point tensors .* torch\.int32"):
        quantize_weight(x.int(), qint8)
    with pytest.raises(ValueError, match="reshape the weight to a matrix"):
        quantize_weight(x.reshape(6, 8, 5), qint4, group_size=20)
    with pytest.raises(ValueError, match=r"groups of axis -1 need a matrix"):
        quantize_weight(x.reshape(6, 8, 5), qint4, -1, group_size=2)


def test_what_optimize_returns_is_checked() -> None:
    class Bad(Range):
        answer: object = None

        def optimize(self, base: Tensor, qtype: QType, axis: int) -> tuple[Tensor, Tensor]:
            return self.answer  # type: ignore[return-value]

    bad, x = Bad(), oracle.data(6, 40)
    scheme = Scheme.parse("qint4/channel=0/shift/float16")
    for answer, kind, message in (
        (None, TypeError, r"Bad.optimize must return \(scale, shift\), got NoneType"),
        ((torch.ones(6), 3), TypeError, "floating point tensor as shift"),
        ((torch.ones(5), torch.ones(6)), ValueError, r"a scale of 6 elements, got shape \[5\]"),
        ((torch.full((6,), 1e9), torch.ones(6)), ValueError, r"a scale that does not fit in torch\.float16"),
    ):
        bad.answer = answer
        with pytest.raises(kind, match=message):
            bad.qparams(x, scheme)
    with pytest.raises(NotImplementedError, match="AffineOptimizer must override optimize"):
        AffineOptimizer().qparams(x, scheme)


def test_given_scale_and_zero_are_checked() -> None:
    x, scheme = oracle.data(6, 40), Scheme.parse("qint4/channel=0/affine/float32")
    zero = torch.zeros(6, dtype=torch.uint8)
    for scale, point, message in (
        (torch.ones(5), zero, "has scale of shape"),
        (torch.ones(6).half(), zero, "has scale of shape"),
        (torch.ones(6), None, "needs a zero point"),
        (torch.ones(6), zero + 16, "is a code, at most 15; got 16"),
        (-torch.ones(6), zero, "finite and above zero"),
        (torch.full((6,), float("nan")), zero, "finite and above zero"),
    ):
        with pytest.raises(ValueError, match=message):
            QTensor.from_qparams(x, scale, point, scheme)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "qfloat8", "optimizer": HqqOptimizer()}, "for integer dtypes"),
        ({"weights": "qint4", "mode": "affine", "optimizer": AbsmaxOptimizer()}, "finds no zero point"),
    ],
)
def test_a_pair_that_cannot_be_is_refused_before_anything_is_changed(options: dict[str, object], message: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(ValueError, match=message):
        qcompile.quantize(model, **options)
    assert type(model[0]) is torch.nn.Linear
