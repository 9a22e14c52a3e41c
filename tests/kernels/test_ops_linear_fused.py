"""Epilogues of ``qcompile::linear``, and ``qcompile::linear_split``: values, gradients, shapes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme

ops = torch.ops.qcompile
TEXT = "qint4/group=16/affine/float16"
F = torch.nn.functional

#: Each activation as numpy has it, and as plain torch for gradients.
ACTIVATIONS = {
    "none": (lambda v: v, lambda t: t),
    "relu": (lambda v: np.maximum(v, 0), torch.relu),
    "gelu": (lambda v: v * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(v / math.sqrt(2))), F.gelu),
    "gelu_tanh": (
        lambda v: v * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        lambda t: F.gelu(t, approximate="tanh"),
    ),
    "silu": (lambda v: v / (1 + np.exp(-v)), F.silu),
    "sigmoid": (lambda v: 1 / (1 + np.exp(-v)), torch.sigmoid),
    "tanh": (np.tanh, torch.tanh),
}


def _weight(n: int, k: int) -> QTensor:
    # small, so that activations are met where they bend
    return QTensor.quantize(oracle.data(n, k) / k, Scheme.parse(TEXT))


def _args(q: QTensor, bias: torch.Tensor | None) -> tuple[object, ...]:
    return q.data, q.scale, q.zero, bias, str(q.scheme), list(q.shape)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("glu", [False, True])
def test_epilogue(activation: str, glu: bool) -> None:
    q = _weight(14, 33)
    width = 7 if glu else 14
    for lead, dtype in itertools.product([(), (5,), (2, 3), (0,)], [torch.float32, torch.bfloat16]):
        x, bias = oracle.data(*lead, 33, dtype=dtype), oracle.data(14, dtype=dtype, seed=1)
        mul, add = (oracle.data(*lead, width, dtype=dtype, seed=s) for s in (2, 3))
        pre = oracle.wide(x) @ oracle.value(q).T + oracle.wide(bias)
        act = ACTIVATIONS[activation][0]
        inner = act(pre[..., :7]) * pre[..., 7:] if glu else act(pre)
        for m, a in [(None, None), (mul, None), (None, add), (mul, add)]:
            got = ops.linear(x, *_args(q, bias), activation, m, a, glu)
            product = inner * (1 if m is None else oracle.wide(m))
            want = product + (0 if a is None else oracle.wide(a))
            assert got.dtype == dtype
            assert oracle.relative(got, want, product) < 3 * oracle.TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("glu", [False, True])
def test_epilogue_gradients(activation: str, glu: bool) -> None:
    q = _weight(14, 33)
    weight = torch.from_numpy(oracle.value(q))
    x, bias, mul, add = (
        oracle.data(*shape, dtype=torch.float64, seed=seed).requires_grad_()
        for seed, shape in enumerate([(2, 3, 33), (14,), (2, 3, 7 if glu else 14), (2, 3, 7 if glu else 14)])
    )
    act = ACTIVATIONS[activation][1]
    for m, a in [(None, None), (mul, None), (None, add), (mul, add)]:
        pre = F.linear(x, weight, bias)
        want = act(pre[..., :7]) * pre[..., 7:] if glu else act(pre)
        want = want if m is None else want * m
        want = want if a is None else want + a
        got = ops.linear(x, *_args(q, bias), activation, m, a, glu)
        inputs = [t for t in (x, bias, m, a) if t is not None]
        grad = torch.randn_like(want)
        for one, other in zip(
            torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("glu", [False, True])
def test_epilogue_opcheck(activation: str, glu: bool) -> None:
    q = _weight(14, 33)
    x, bias = oracle.data(5, 33).requires_grad_(), oracle.data(14).requires_grad_()
    mul, add = (oracle.data(5, 7 if glu else 14, seed=s).requires_grad_() for s in (2, 3))
    for m, a in [(None, None), (mul, None), (None, add), (mul, add)]:
        oracle.opcheck(ops.linear, (x, *_args(q, bias), activation, m, a, glu))


def test_epilogue_wrong_input() -> None:
    q, x = _weight(13, 33), torch.ones(5, 33)
    with pytest.raises(ValueError, match="unknown activation 'swish'; allowed: none, relu"):
        ops.linear(x, *_args(q, None), "swish")
    with pytest.raises(ValueError, match="even number of rows"):
        ops.linear(x, *_args(q, None), "silu", None, None, True)
    for name in ("mul", "add"):
        with pytest.raises(ValueError, match=rf"{name} must have the shape \[5, 13\] of the result, got \[13\]"):
            ops.linear(x, *_args(q, None), **{name: torch.ones(13)})
        with pytest.raises(ValueError, match=rf"{name} must be torch.float32 like x, got torch.float64"):
            ops.linear(x, *_args(q, None), **{name: torch.ones(5, 13, dtype=torch.float64)})


SIZES = [[14], [7, 7], [1, 12, 1], [3, 4, 7]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_split(sizes: list[int], lead: tuple[int, ...]) -> None:
    q = _weight(14, 33)
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = oracle.data(*lead, 33, dtype=dtype), oracle.data(14, dtype=dtype, seed=1)
        parts = ops.linear_split(x, *_args(q, bias), sizes)
        want = oracle.wide(x) @ oracle.value(q).T + oracle.wide(bias)
        assert [part.shape[-1] for part in parts] == sizes and all(part.is_contiguous() for part in parts)
        assert oracle.relative(torch.cat(parts, -1), want) < oracle.TOLERANCE[dtype]
    oracle.opcheck(ops.linear_split, (x, *_args(q, bias), sizes))


@pytest.mark.parametrize("sizes", SIZES)
def test_split_gradients(sizes: list[int]) -> None:
    q = _weight(14, 33)
    weight = torch.from_numpy(oracle.value(q))
    x, bias = oracle.data(2, 3, 33, dtype=torch.float64), oracle.data(14, dtype=torch.float64)
    x.requires_grad_()
    bias.requires_grad_()
    got = sum(((i + 1) * part.square().sum() for i, part in enumerate(ops.linear_split(x, *_args(q, bias), sizes))))
    parts = F.linear(x, weight, bias).split(sizes, -1)
    want = sum(((i + 1) * part.square().sum() for i, part in enumerate(parts)))
    for one, other in zip(torch.autograd.grad(got, [x, bias]), torch.autograd.grad(want, [x, bias]), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    # a part that nothing uses has no gradient of its own
    (first,) = torch.autograd.grad(ops.linear_split(x, *_args(q, None), sizes)[0].sum(), [x])
    (other,) = torch.autograd.grad(F.linear(x, weight[: sizes[0]]).sum(), [x])
    torch.testing.assert_close(first, other, rtol=1e-10, atol=1e-10)
    oracle.opcheck(ops.linear_split, (x.detach().float().requires_grad_(), *_args(q, None), sizes))


@pytest.mark.parametrize("sizes", [[], [13], [7, 8], [14, 0], [15, -1]])
def test_split_wrong_sizes(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="do not cut a weight of 14 rows"):
        ops.linear_split(torch.ones(2, 33), *_args(_weight(14, 33), None), sizes)
