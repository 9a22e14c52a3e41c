from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme

ops = torch.ops.qcompile
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEADS: list[tuple[int, ...]] = [(), (1,), (7,), (0,), (2, 3), (2, 0, 3)]


def _weight(text: str, n: int, k: int) -> QTensor:
    return QTensor.quantize(oracle.data(n, k), Scheme.parse(text))


def _args(q: QTensor, bias: torch.Tensor | None = None) -> tuple[object, ...]:
    return q.data, q.scale, q.zero, bias, str(q.scheme), list(q.shape)


@pytest.mark.parametrize("text", oracle.SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(text: str, dtype: torch.dtype) -> None:
    for n, k in [(1, 1), (7, 97), (33, 160)]:
        q = _weight(text, n, k)
        bias = oracle.data(n, dtype=dtype)
        for lead in LEADS:
            x = oracle.data(*lead, k, dtype=dtype, seed=1)
            got = ops.linear(x, *_args(q, bias))
            assert got.dtype == dtype
            product, added = oracle.wide(x) @ oracle.value(q).T, np.broadcast_to(oracle.wide(bias), got.shape)
            assert oracle.relative(got, product + added, product, added) < oracle.TOLERANCE[dtype]


@pytest.mark.parametrize("text", oracle.SCHEMES)
def test_linear_opcheck(text: str) -> None:
    q = _weight(text, 9, 33)
    for x in (oracle.data(5, 33), oracle.data(2, 3, 33).requires_grad_(), oracle.data(33), oracle.data(0, 33)):
        oracle.opcheck(ops.linear, (x, *_args(q)))
    x, bias = oracle.data(4, 33, dtype=torch.bfloat16).requires_grad_(), oracle.data(9, dtype=torch.bfloat16)
    oracle.opcheck(ops.linear, (x, *_args(q, bias.requires_grad_())))


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_linear_of_a_view(view: str) -> None:
    q = _weight("qint4/group=16/affine/float16", 9, 33)
    x = {"transposed": oracle.data(33, 6).t(), "strided": oracle.data(12, 66)[::2, ::2],
         "expanded": oracle.data(33).expand(4, 33)}[view]  # fmt: skip
    oracle.opcheck(ops.linear, (x, *_args(q)))
    assert oracle.relative(ops.linear(x, *_args(q)), oracle.wide(x) @ oracle.value(q).T) < 1e-6


def test_linear_with_no_features_or_no_outputs() -> None:
    for n, k in [(5, 0), (0, 8), (0, 0)]:
        q = _weight("qint4/group=4/affine/float32", n, k)
        got = ops.linear(torch.ones(3, k), *_args(q, torch.arange(float(n))))
        assert torch.equal(got, torch.arange(float(n)).expand(3, n))


@pytest.mark.parametrize("text", ["qint4/group=16/affine/float16", "qint3/channel=0/symmetric/float32",
                                  "qfloat8_e5m2/tensor/symmetric/float32"])  # fmt: skip
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_linear_gradients_are_those_of_the_dequantized_weight(text: str, lead: tuple[int, ...]) -> None:
    q = _weight(text, 9, 33)
    weight = torch.from_numpy(oracle.value(q))
    x, bias, grad = (oracle.data(*shape, dtype=torch.float64, seed=i).requires_grad_(i < 2)
                     for i, shape in enumerate([(*lead, 33), (9,), (*lead, 9)]))  # fmt: skip
    got = torch.autograd.grad(ops.linear(x, *_args(q, bias)), [x, bias], grad)
    want = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), [x, bias], grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_linear_gradcheck() -> None:
    q = _weight("qint8/channel=0/symmetric/float32", 4, 7)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: ops.linear(x, *_args(q, b)), (x, bias))


def test_linear_gradient_of_the_bias_alone() -> None:
    q = _weight("qint8/channel=0/symmetric/float32", 4, 7)
    bias = torch.zeros(4, requires_grad=True)
    ops.linear(torch.ones(3, 7), *_args(q, bias)).sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [3.0] * 4


PAIRS = [
    ("qint8/group=33/symmetric/float32", "qint8/channel=0/symmetric/float32"),
    ("qint8/tensor/symmetric/float32", "qint8/tensor/symmetric/float16"),
    ("qint8/group=16/symmetric/float32", "qint8/group=8/symmetric/bfloat16"),
    ("qint8/group=33/symmetric/float32", "qint8/block=4x16/symmetric/float32"),
    ("qint8/channel=0/symmetric/float32", "qint8/channel=1/symmetric/float32"),
    ("qfloat8_e4m3fn/group=33/symmetric/float32", "qfloat8_e4m3fn/channel=0/symmetric/float32"),
    ("qfloat8_e4m3fn/tensor/symmetric/float32", "qfloat8_e5m2/tensor/symmetric/float32"),
    ("qfloat8_e4m3fnuz/group=16/symmetric/float32", "qfloat8_e4m3fnuz/group=32/symmetric/float32"),
]


@pytest.mark.parametrize(("x_text", "text"), PAIRS)
def test_linear_quantized(x_text: str, text: str) -> None:
    w = _weight(text, 9, 33)
    bias = oracle.data(9)
    for rows in (1, 5, 0):
        x = QTensor.quantize(oracle.data(rows, 33, seed=3), Scheme.parse(x_text))
        for dtype in (torch.float32, torch.bfloat16):
            for b in (bias, None):
                args = (x.data, x.scale, w.data, w.scale, b, x_text, text, [9, 33], dtype)
                oracle.opcheck(ops.linear_quantized, args)
                want = oracle.value(x) @ oracle.value(w).T + (oracle.wide(bias) if b is not None else 0)
                got = ops.linear_quantized(*args)
                assert got.dtype == dtype and oracle.relative(got, want) < oracle.TOLERANCE[dtype]


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)])
def test_linear_quantized_of_any_lead(lead: tuple[int, ...]) -> None:
    x_text, text = PAIRS[0]
    w, x = _weight(text, 9, 33), oracle.data(*lead, 33)
    codes, scale = ops.quantize_dynamic(x, x_text)
    args = (codes, scale, w.data, w.scale, None, x_text, text, [9, 33], torch.float32)
    oracle.opcheck(ops.linear_quantized, args)
    want = oracle.value(QTensor(codes, scale, None, Scheme.parse(x_text), tuple(x.shape))) @ oracle.value(w).T
    assert oracle.relative(ops.linear_quantized(*args), want) < 1e-6
    assert oracle.relative(ops.linear_quantized(*args), oracle.wide(x) @ oracle.value(w).T) < 0.03


def test_linear_quantized_is_exact_where_float32_is_not() -> None:
    """The sum of 4096 products of 127 is beyond the integers that float32 holds one by one."""
    codes = torch.full((1, 4096), 127, dtype=torch.int8)
    weight = codes.clone()
    weight[0, 0] = 126
    one = torch.ones(1, 1)
    got = ops.linear_quantized(codes, one, weight, one[0], None, "qint8/group=4096/symmetric/float32",
                               "qint8/channel=0/symmetric/float32", [1, 4096], torch.float64)  # fmt: skip
    assert got.item() == 4096 * 127 * 127 - 127


def test_linear_quantized_with_no_features() -> None:
    got = ops.linear_quantized(
        torch.ones(3, 0, dtype=torch.int8), torch.ones(3, 0), torch.ones(5, 0, dtype=torch.int8), torch.ones(5), None,
        "qint8/group=8/symmetric/float32", "qint8/channel=0/symmetric/float32", [5, 0], torch.float32,
    )  # fmt: skip
    assert torch.equal(got, torch.zeros(3, 5))


def test_wrong_input() -> None:
    q = _weight("qint4/group=16/affine/float16", 9, 33)
    for bad in (torch.ones(4, 32), torch.ones(33, 4), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"does not fit a weight of shape \[9, 33\]"):
            ops.linear(bad, *_args(q))
    data, scale, zero, *_ = _args(q)
    with pytest.raises(ValueError, match=r"has shape \[N, K\]"):
        ops.linear(torch.ones(4, 33), data[None], scale[None], zero[None], None, str(q.scheme), [1, 9, 33])  # type: ignore[index]
    with pytest.raises(ValueError, match="has data of shape"):
        ops.linear(torch.ones(4, 33), *_args(q)[:-1], [9, 35])
    x_text, text = PAIRS[0]
    x, w = torch.ones(2, 33, dtype=torch.int8), torch.ones(9, 33, dtype=torch.int8)
    sx, sw = torch.ones(2, 1), torch.ones(9)
    with pytest.raises(ValueError, match="do not go together"):
        ops.linear_quantized(x, sx, w, sw, None, x_text, PAIRS[5][1], [9, 33], torch.float32)
    with pytest.raises(ValueError, match="symmetric 8-bit"):
        ops.linear_quantized(x, sx, w, sw, None, x_text, "qint4/channel=0/symmetric/float32", [9, 33], torch.float32)
    with pytest.raises(ValueError, match="symmetric 8-bit"):
        ops.linear_quantized(x, sx, w, sw, None, "qint8/tensor/affine/float32", text, [9, 33], torch.float32)
    with pytest.raises(ValueError, match="has scale of shape"):
        ops.linear_quantized(x, sx[:1], w, sw, None, x_text, text, [9, 33], torch.float32)


def test_a_scale_is_used_for_its_own_channel() -> None:
    """Not a norm: each output alone, so that two channels that swap their scales are seen."""
    scheme = Scheme.parse("qint8/channel=0/symmetric/float32")
    weight = torch.eye(5) * torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4])
    q = QTensor.quantize(weight, scheme)
    np.testing.assert_allclose(ops.linear(torch.eye(5), *_args(q)).numpy(), weight.t().numpy(), rtol=1e-6)


def test_linear_quantized_gradient_of_the_bias_and_no_other() -> None:
    x_text, text = PAIRS[0]
    w, x = _weight(text, 9, 33), oracle.data(2, 3, 33).requires_grad_()
    bias = oracle.data(9, dtype=torch.bfloat16).requires_grad_()
    rest = (w.data, w.scale, bias, x_text, text, [9, 33], torch.float32)
    with torch.no_grad():
        codes, scale = ops.quantize_dynamic(x, x_text)
    grad = oracle.data(2, 3, 9)
    ops.linear_quantized(codes, scale, *rest).backward(grad)
    assert bias.grad is not None and bias.grad.dtype == torch.bfloat16
    assert oracle.relative(bias.grad, oracle.wide(grad).sum((0, 1))) < 6e-3
    # Not a gradient that only looks like one: the codes carry none.
    out = ops.linear_quantized(*ops.quantize_dynamic(x, x_text), *rest)
    with pytest.raises(RuntimeError, match="gradient with respect to its bias only"):
        out.sum().backward()
