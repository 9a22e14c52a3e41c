"""The operators that linears on GPUs are written out as: references, schemas, and that wrong arguments are refused."""

from __future__ import annotations

import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.triton.register import pack_planes

qc = torch.ops.qcompile
OPTIONS = (4, "int", 32)


def packed() -> tuple[torch.Tensor, ...]:
    q = QTensor.quantize(oracle.data(24, 70), Scheme.parse("qint4/group=32/affine/float16"))
    found = pack_planes(q, None, False).tensors
    return tuple(t for t in found if t is not None)


def coded() -> tuple[object, ...]:
    """Arguments of ``codes_product`` up to the gate: ``x, x_scale, data, scale, bias, x_scheme, scheme, shape``."""
    x = torch.randint(-127, 128, (5, 70), dtype=torch.int8)
    q = QTensor.quantize(oracle.data(24, 70), Scheme.parse("qint8/channel=0/symmetric/float32"))
    x_scheme = "qint8/group=70/symmetric/float32"
    return (x, torch.rand(5, 1), q.data, q.scale, torch.randn(24), x_scheme, str(q.scheme), [24, 70])


def test_opcheck() -> None:
    x, bias = torch.randn(3, 70), torch.randn(24)
    for gate in (None, "silu"):
        oracle.opcheck(qc.planes_product, (x, *packed(), bias, *OPTIONS, gate))
        oracle.opcheck(qc.codes_product, (*coded(), gate))
    oracle.opcheck(qc.split_columns, (torch.randn(2, 3, 9), [4, 5]))


@pytest.mark.parametrize("gate", [None, "gelu"])
def test_products_are_the_linears_without_an_epilogue(gate: str | None) -> None:
    x, bias, parts = oracle.data(3, 70), torch.randn(24), packed()
    want = qc.linear_planes(x, *parts, bias, *OPTIONS, 12 if gate else 24, gate or "none", None, None, gate is not None)
    assert torch.allclose(qc.planes_product(x, *parts, bias, *OPTIONS, gate), want, atol=1e-4)
    given = coded()
    want = qc.linear_quantized(*given, torch.float32, gate or "none", None, None, gate is not None)
    assert torch.allclose(qc.codes_product(*given, gate), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_columns_are_contiguous_and_their_own() -> None:
    y = torch.randn(2, 3, 9)
    parts = qc.split_columns(y, [4, 5])
    assert all(p.is_contiguous() for p in parts) and torch.equal(torch.cat(parts, -1), y)
    parts[0].zero_()
    assert bool(y[..., :4].any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(1, 3, 70)}, "must be matrices"),
        ({"x": torch.ones(3, 70, dtype=torch.int32)}, "x must be float32"),
        ({"codes": torch.zeros(24, 64, dtype=torch.int16)}, "codes must be"),
        ({"bias": torch.ones(3)}, "bias must be"),
        ({"gate": "swish"}, "activation must be"),
        ({"bits": 5}, "bits must be"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, object], message: str) -> None:
    codes, scale, zero = packed()
    given: dict[str, object] = {
        "x": torch.randn(3, 70), "codes": codes, "scale": scale, "zero": zero, "bias": None, "bits": 4, "kind": "int",
        "group_size": 32, "gate": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        qc.planes_product(**{**given, **change})


def test_what_does_not_fit_of_codes_is_said() -> None:
    x, *rest = coded()
    assert isinstance(x, torch.Tensor)
    with pytest.raises(ValueError, match="x must be a matrix"):
        qc.codes_product(x.view(1, 5, 70), torch.rand(1, 5, 1), *rest[1:])
    with pytest.raises(ValueError, match="as many rows each"):
        odd = (rest[1][:23], rest[2][:23], None, rest[4], rest[5], [23, 70])  # type: ignore[index]
        qc.codes_product(x, rest[0], *odd, "silu")
