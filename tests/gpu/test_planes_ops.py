"""The operators on the planes layout: references, schemas, gradients, and that wrong arguments are refused."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.ops.norm_quantize import norm_quantize
from qcompile.kernels.triton.register import pack_planes

qc = torch.ops.qcompile


def packed(scheme: str, *shape: int) -> tuple[QTensor, tuple[Any, ...], tuple[int, str, int]]:
    q = QTensor.quantize(oracle.data(*shape), Scheme.parse(scheme))
    found = pack_planes(q, None, False)
    kind = str(q.scheme.qtype.dtype).removeprefix("torch.float8_") if q.scheme.qtype.is_float else "int"
    return q, found.tensors, (found.sizes["bits"], kind, found.sizes["group_size"])


@pytest.mark.parametrize("scheme", ["qint4/group=32/affine/float16", "qfloat8_e5m2/channel=0/symmetric/float32"])
def test_opcheck(scheme: str) -> None:
    _, parts, options = packed(scheme, 24, 70)
    x, other = torch.randn(3, 70, requires_grad=True), torch.randn(3, 12, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    oracle.opcheck(qc.linear_planes, (x, *parts, bias, *options, 12, "silu", other, other, True))
    oracle.opcheck(qc.linear_planes_split, (x, *parts, bias, *options, [20, 4]))
    oracle.opcheck(qc.dequantize_planes, (*parts, *options, 70, torch.float16))
    oracle.opcheck(qc.embedding_planes, (torch.tensor([[3, 0]]), *parts, *options, 24, 70, torch.float32))
    oracle.opcheck(qc.norm_quantize, (torch.randn(4, 8), torch.randn(8), None, 1e-5, "rms", "qint8"))
    scheme = scheme.replace("channel=0", "group=70")
    _, parts, options = packed(scheme, 2, 24, 70)
    oracle.opcheck(qc.grouped_linear_planes, (torch.randn(5, 70), *parts, torch.tensor([2, 5]), *options))


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"])
def test_gradients_are_those_of_the_float_model(activation: str, glu: bool) -> None:
    q, parts, options = packed("qint4/group=32/affine/float32", 24, 70)
    n = 12 if glu else 24
    leaves = [torch.randn(s, requires_grad=True) for s in ((5, 70), (24,), (5, n), (5, n))]
    x, bias, mul, add = leaves
    qc.linear_planes(x, *parts, bias, *options, n, activation, mul, add, glu).square().sum().backward()
    got = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    qc.linear(x, q.data, q.scale, q.zero, bias, str(q.scheme), [24, 70], activation, mul, add, glu).square().sum().backward()
    for g, t in zip(got, leaves, strict=True):
        assert oracle.relative(g, oracle.wide(t.grad)) < 1e-5


def test_gradients_of_siblings() -> None:
    q, parts, options = packed("qint8/channel=0/symmetric/float32", 24, 70)
    x, bias = torch.randn(5, 70, requires_grad=True), torch.randn(24, requires_grad=True)
    a, b = qc.linear_planes_split(x, *parts, bias, *options, [20, 4])
    (a.square().sum() + 3 * b.sum()).backward()
    y = x.detach().double() @ q.dequantize().double().T + bias.detach().double()
    grad = torch.cat([2 * y[:, :20], torch.full((5, 4), 3.0).double()], 1)
    assert oracle.relative(x.grad, oracle.wide(grad @ q.dequantize().double())) < 1e-5
    assert oracle.relative(bias.grad, oracle.wide(grad.sum(0))) < 1e-5


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("qtype", ["qint8", "qfloat8_e4m3fn"])
def test_norm_quantize_is_norm_then_quantize(norm: str, qtype: str) -> None:
    x, weight, bias = oracle.data(6, 33), torch.randn(33), torch.randn(33)
    x[2] = 0
    codes, scale = norm_quantize(x, weight, bias if norm == "layer" else None, 1e-5, norm, qtype)
    functional = torch.nn.functional
    rms = functional.rms_norm(x, (33,), weight, 1e-5)
    y = functional.layer_norm(x, (33,), weight, bias, 1e-5) if norm == "layer" else rms
    want, want_scale = qc.quantize_dynamic(y, f"{qtype}/group=33/symmetric/float32")
    assert oracle.relative(scale, oracle.wide(want_scale)) < 1e-6
    assert float((codes.float() * scale - want.float() * want_scale).abs().max()) <= float(scale.max()) * 1.01 * (
        1 if qtype == "qint8" else 32
    )
    assert oracle.relative(codes.float() * scale, oracle.wide(y)) < (0.02 if qtype == "qint8" else 0.05)


def test_norm_quantize_shows_what_is_not_finite() -> None:
    x = torch.randn(3, 8)
    x[0, 1], x[1, 2] = float("nan"), float("inf")
    codes, scale = norm_quantize(x, None, None, 1e-5, "rms", "qint8")
    assert scale.isfinite().flatten().tolist() == [False, False, True] and codes.dtype == torch.int8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be"),
        ({"kind": "e4m3fn"}, "kind must be"),
        ({"codes": torch.zeros(24, 64, dtype=torch.int16)}, "codes must be"),
        ({"scale": torch.ones(24, 2)}, "scale must be"),
        ({"zero": torch.ones(24, 3)}, "zero must be"),
        ({"out_features": 0}, "out_features"),
        ({"bias": torch.ones(3)}, "bias must be"),
        ({"activation": "swish"}, "activation must be"),
        ({"mul": torch.ones(2, 24)}, "mul must have"),
        ({"x": torch.ones(3, 70, dtype=torch.int32)}, "x must be float32"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, object], message: str) -> None:
    _, (codes, scale, zero), (bits, kind, group) = packed("qint4/group=32/affine/float16", 24, 70)
    given: dict[str, object] = {
        "x": torch.randn(3, 70), "codes": codes, "scale": scale, "zero": zero, "bias": None, "bits": bits, "kind": kind,
        "group_size": group, "out_features": 24, "activation": "none", "mul": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        qc.linear_planes(**{**given, **change})
