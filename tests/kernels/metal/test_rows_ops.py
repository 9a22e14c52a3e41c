"""``linear_rows`` and ``linear_rows_split``: the references against float64, gradients, errors, and the dispatch table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import SCHEMES, TOLERANCE, data, relative, wide
from row_weights import KINDS, random_matrix
from tiled_weights import ACTIVATIONS
from torch import Tensor

import qcompile
from qcompile.export import lowered
from qcompile.kernels import QTensor, Scheme, dispatch
from qcompile.kernels.layouts.rows import Rows, pack

OPS = torch.ops.qcompile


def packed(n: int, k: int, group: int, bits: int, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Rows, Tensor]:
    matrix = random_matrix(n, k, group, bits, kind, dtype)
    return pack(matrix.codes, matrix.scale, matrix.zero, bits, group), matrix.value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reference_is_the_product(bits: int, kind: str, dtype: torch.dtype) -> None:
    w, value = packed(37, 97, 25, bits, kind, dtype)
    x, bias = data(2, 3, 97, dtype=dtype) / 100, data(37, dtype=dtype)
    y = OPS.linear_rows(x, w.codes, w.scale, w.zero, bias, bits, 25, 37)
    want = wide(x) @ wide(value).T
    assert relative(y, want + wide(bias), want) < TOLERANCE[dtype]
    parts = OPS.linear_rows_split(x, w.codes, w.scale, w.zero, bias, bits, 25, [30, 7])
    assert all(part.is_contiguous() for part in parts) and torch.equal(torch.cat(parts, -1), y)
    assert OPS.linear_rows(x[:0], w.codes, w.scale, w.zero, bias, bits, 25, 37).shape == (0, 3, 37)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("glu", [False, True])
def test_epilogue_and_gradients(activation: str, glu: bool) -> None:
    n = 20
    w, value = packed(2 * n if glu else n, 64, 32, 4, "affine")
    leaves = [data(2, 3, 64) / 100, torch.randn(len(value)), torch.randn(2, 3, n), torch.randn(2, 3, n)]
    x, bias, mul, add = (t.requires_grad_() for t in leaves)
    y = OPS.linear_rows(x, w.codes, w.scale, w.zero, bias, 4, 32, n, activation, mul, add, glu)
    grad = torch.randn(2, 3, n)
    y.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    pre = exact[0] @ value.T + exact[1]
    act = ACTIVATIONS[activation]
    want = (act(pre[..., :n]) * pre[..., n:] if glu else act(pre)) * exact[2] + exact[3]
    want.backward(grad.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    for got, expected in zip((x, bias, mul, add), exact, strict=True):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-4, atol=1e-3)


def test_gradients_of_siblings() -> None:
    w, value = packed(30, 64, 32, 8, "shift")
    x, bias = data(3, 64).requires_grad_(), torch.randn(30, requires_grad=True)
    grads = [torch.randn(3, 20), torch.randn(3, 10)]
    torch.autograd.backward(OPS.linear_rows_split(x, w.codes, w.scale, w.zero, bias, 8, 32, [20, 10]), grads)
    both = torch.cat(grads, -1)
    torch.testing.assert_close(x.grad.double(), both.double() @ value, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(bias.grad, both.sum(0))


def test_opcheck() -> None:
    w, _ = packed(40, 64, 32, 4, "affine")
    x, bias, mul = data(3, 64).requires_grad_(), torch.randn(40, requires_grad=True), torch.randn(3, 20)
    torch.library.opcheck(OPS.linear_rows.default, (x, w.codes, w.scale, w.zero, bias, 4, 32, 40, "gelu"))
    glu = (x, w.codes, w.scale, w.zero, bias, 4, 32, 20, "silu", mul, mul, True)
    torch.library.opcheck(OPS.linear_rows.default, glu)
    torch.library.opcheck(OPS.linear_rows_split.default, (x, w.codes, w.scale, w.zero, bias, 4, 32, [30, 10]))


def test_wrong_arguments() -> None:
    w, _ = packed(20, 64, 32, 4, "affine")
    x, args = data(3, 64), (w.codes, w.scale, w.zero)
    with pytest.raises(ValueError, match="x must be float32"):
        OPS.linear_rows(x.double(), *args, None, 4, 32, 20)
    with pytest.raises(ValueError, match=r"codes must be \[20, 40\] for 80 columns"):
        OPS.linear_rows(data(3, 80), *args, None, 4, 32, 20)
    with pytest.raises(ValueError, match="activation must be one of"):
        OPS.linear_rows(x, *args, None, 4, 32, 20, "swish")
    with pytest.raises(ValueError, match=r"mul must have the output's shape \[3, 20\]"):
        OPS.linear_rows(x, *args, None, 4, 32, 20, "none", torch.randn(3, 1))
    with pytest.raises(ValueError, match=r"bias must be \[20\]"):
        OPS.linear_rows(x, *args, torch.randn(10), 4, 32, 20)
    with pytest.raises(ValueError, match="codes must be"):
        OPS.linear_rows_split(x, *args, None, 4, 32, [10, 5])
    with pytest.raises(ValueError, match="sizes must be"):
        OPS.linear_rows_split(x, *args, None, 4, 32, [20, 0])


@pytest.mark.parametrize(
    "name", [s for s in SCHEMES if "float8" not in s and "channel=1/" not in s and "channel=-1/" not in s]
)
def test_the_table_packs_and_unpacks_every_scheme(name: str) -> None:
    scheme = Scheme.parse(name)
    kernel, why = dispatch.choose("linear", "mps", scheme, (37, 97), torch.float16)
    assert kernel is not None and kernel.unpack is not None, why
    q = QTensor.quantize(data(37, 97), scheme)
    made = kernel.pack(q, None, False)
    back = kernel.unpack(made, scheme, q.shape, None, False)
    assert torch.equal(back.data, q.data) and torch.equal(back.scale, q.scale)
    assert (back.zero is None) == (q.zero is None) and (q.zero is None or torch.equal(back.zero, q.zero))  # type: ignore[arg-type]
    args = {"x": data(3, 97), "bias": None, "activation": "none", "mul": None, "add": None, "glu": False, "exact": True}
    y = kernel.target(*kernel.arguments(made.tensors, made.sizes, args))
    assert relative(y, wide(args["x"]) @ wide(q.dequantize(torch.float64)).T) < 1e-6


def test_what_the_kernels_refuse() -> None:
    for scheme, shape in (
        ("qfloat8_e4m3fn/channel=0/symmetric/float32", (8, 8)),
        ("qint8/channel=1/affine/float32", (8, 8)),
    ):
        kernel, why = dispatch.choose("linear", "mps", Scheme.parse(scheme), shape, torch.float16)
        assert kernel is None and "metal-rows" in why


def test_a_lowered_program_calls_them() -> None:
    """The whole way of a graph, with the table's entry for Apple GPUs put in the CPU's place."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = torch.nn.Linear(64, 48), torch.nn.Linear(64, 16), torch.nn.Linear(64, 16)
            self.gate, self.up = torch.nn.Linear(48, 80), torch.nn.Linear(48, 80)
            self.down = torch.nn.Linear(80, 48)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x) + self.k(x).repeat(1, 3) * self.v(x).repeat(1, 3)
            return self.down(torch.nn.functional.silu(self.gate(q)) * self.up(q)) + q

    model, x = Block().eval(), data(5, 64) / 10
    program = qcompile.quantize(torch.export.export(model, (x,)), weights="qint4", group_size=32, min_elements=0)
    expected = program.module()(x)
    table = [dispatch.register(replace(k, device="cpu")) for k in dispatch.kernels(device="mps") if k.name == "metal-rows"]
    try:
        graph = lowered(program)
    finally:
        for kernel in table:
            dispatch.unregister(kernel)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert {"qcompile.linear_rows.default", "qcompile.linear_rows_split.default"} <= targets, targets
    assert not any("linear_tiled" in name for name in targets), targets
    torch.testing.assert_close(graph.module()(x), expected, rtol=1e-4, atol=1e-4)
