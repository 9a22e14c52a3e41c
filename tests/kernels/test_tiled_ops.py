"""The other operators on the tiled layout, and what all of them share: tracing, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import data
from tiled_weights import ACTIVATIONS, KINDS, error, random_weight
from torch import Tensor

from qcompile.kernels.cpu import build
from qcompile.kernels.layouts.tiled import WIDTHS

OPS = torch.ops.qcompile
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_siblings_in_one_pass(isa: str, bits: int, kind: str) -> None:
    sizes = (40, 5, 16, 33)
    w = random_weight(sum(sizes), 97, 32, bits, kind, parts=sizes)
    bias = torch.randn(sum(sizes))
    for m in (0, 1, 4, 40):
        x = data(m, 97)
        expected = (x.double() @ w.matrix.T + bias).split(list(sizes), -1)
        for exact, bound in ((False, 2.3e-2), (True, 1e-5)):
            outputs = OPS.linear_tiled_split(x, *w.args, bias, bits, 32, sizes, exact)
            assert [tuple(y.shape) for y in outputs] == [(m, s) for s in sizes]
            assert all(y.is_contiguous() for y in outputs)
            if m:
                off = error(torch.cat(outputs, -1), torch.cat(expected, -1), x, w.matrix)
                assert off <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_dequantize_and_embedding(isa: str, bits: int, kind: str) -> None:
    for n, k, group in [(97, 97, 32), (16, 100, 48), (33, 64, 0)]:
        w = random_weight(n, k, group, bits, kind)
        for dtype in FLOATS:
            table = OPS.dequantize_tiled(*w.args, bits, group, n, k, dtype)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(table.double(), w.matrix, rtol=eps, atol=1e-6 * 2**bits)
            indices = torch.randint(0, n, (2, 9))
            for index in (indices, indices.int(), indices.T):
                rows = OPS.embedding_tiled(index, *w.args, bits, group, n, k, dtype)
                assert torch.equal(rows, table[index.long()])
    assert OPS.embedding_tiled(torch.zeros(0, dtype=torch.int64), *w.args, bits, group, n, k, dtype).shape == (0, k)
    assert OPS.dequantize_tiled(*w.args, bits, group, 0, k, dtype).shape == (0, k)


@pytest.mark.parametrize("index", [-1, 20, 2**40])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    w = random_weight(20, 64, 0, 4)
    bad = torch.tensor([0, index])
    with pytest.raises((RuntimeError, IndexError), match=r"0\.\.19"):
        OPS.embedding_tiled(bad, *w.args, 4, 0, 20, 64, torch.float32)


def calls() -> list[tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    w, s = random_weight(40, 64, 32, 4), random_weight(40, 64, 32, 4, parts=(30, 10))
    g = random_weight(40, 64, 32, 4, "shift", glu=True)
    x, bias = data(3, 64).requires_grad_(), torch.randn(40, requires_grad=True)
    mul, add = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True)
    return [
        (OPS.linear_tiled.default, (x, *w.args, bias, 4, 32, 40, "gelu")),
        (OPS.linear_tiled.default, (x, *g.args, bias, 4, 32, 20, "silu", mul, add, True)),
        (OPS.linear_tiled_forward.plain, (x.detach(), *w.args, bias.detach(), 4, 32, 40)),
        (OPS.linear_tiled_split.default, (x, *s.args, bias, 4, 32, [30, 10])),
        (OPS.embedding_tiled.default, (torch.tensor([3, 1]), *w.args, 4, 32, 40, 64, torch.float16)),
        (OPS.dequantize_tiled.default, (*w.args, 4, 32, 40, 64, torch.bfloat16)),
    ]


@pytest.mark.parametrize("case", range(6))
def test_opcheck(case: int) -> None:
    build.ensure_loaded()
    op, args = calls()[case]
    # forward and backward round differently in the compiled graph: int8 activations lie close to ties
    torch.library.opcheck(op, args, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"])
@pytest.mark.parametrize("glu", [False, True])
def test_gradients(activation: str, glu: bool) -> None:
    build.ensure_loaded()
    n = 20
    w = random_weight(2 * n if glu else n, 64, 32, 4, glu=glu)
    leaves = [data(2, 3, 64) / 50, torch.randn(len(w.matrix)), torch.randn(2, 3, n), torch.randn(2, 3, n)]
    x, bias, mul, add = (t.requires_grad_() for t in leaves)
    grad = torch.randn(2, 3, n)
    OPS.linear_tiled(x, *w.args, bias, 4, 32, n, activation, mul, add, glu, True).backward(grad)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    pre = exact[0] @ w.matrix.T + exact[1]
    act = ACTIVATIONS[activation]
    y = act(pre[..., :n]) * pre[..., n:] if glu else act(pre)
    (y * exact[2] + exact[3]).backward(grad.double())
    for got, expected in zip((x, bias, mul, add), exact, strict=True):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-4, atol=1e-3)


def test_gradients_of_siblings() -> None:
    w = random_weight(30, 64, 32, 4, parts=(20, 10))
    x, bias = data(3, 64).requires_grad_(), torch.randn(30, requires_grad=True)
    outputs = OPS.linear_tiled_split(x, *w.args, bias, 4, 32, [20, 10], True)
    grads = [torch.randn(3, 20), torch.randn(3, 10)]
    torch.autograd.backward(outputs, grads)
    both = torch.cat(grads, -1)
    torch.testing.assert_close(x.grad.double(), both.double() @ w.matrix, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bias.grad, both.sum(0))


def test_compiled_with_dynamic_rows_and_gradients() -> None:
    build.ensure_loaded()
    w = random_weight(40, 64, 32, 4)

    def model(x: Tensor, bias: Tensor) -> Tensor:
        return OPS.linear_tiled(x * 2, *w.args, bias, 4, 32, 40, "relu").sum(-1)

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for m in (3, 5, 1):
        x, bias = data(m, 64).requires_grad_(), torch.randn(40, requires_grad=True)
        y = compiled(x, bias)
        torch.testing.assert_close(y, model(x, bias))
        (expected,) = torch.autograd.grad(model(x, bias).sum(), x)
        (got,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(got, expected)


def test_a_compiled_program_holds_the_operator_without_a_formula() -> None:
    from torch._inductor.utils import run_and_get_code

    w = random_weight(40, 64, 32, 4)
    x = data(2, 64)
    for options, overload in (((), "plain"), (("none",), "plain"), (("relu",), "default")):
        with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):  # of other versions of this code
            run = torch.compile(lambda x, given=options: OPS.linear_tiled(x, *w.args, None, 4, 32, 40, *given))
            y, code = run_and_get_code(run, x)
        assert f"linear_tiled_forward.{overload}(" in code[0]
        assert torch.equal(y, OPS.linear_tiled(x, *w.args, None, 4, 32, 40, *options))


W = random_weight(20, 64, 32, 4)
X = torch.randn(3, 64)
GOOD: dict[str, Any] = {
    "x": X, "codes": W.tiled.codes, "scale": W.tiled.scale, "zero": W.tiled.zero, "bias": None, "bits": 4,
    "group_size": 32, "out_features": 20,
}  # fmt: skip
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.randn(3, 65)}, "codes must be"),
    ({"x": X.double()}, "x must be float32"),
    ({"x": torch.tensor(1.0)}, "scalar"),
    ({"bits": 3}, "codes must be"),
    ({"bits": 7}, "bits must be"),
    ({"bits": 8}, "codes must be"),
    ({"group_size": 64}, "scale must be"),
    ({"group_size": -1}, "group_size"),
    ({"out_features": 33}, "codes must be"),
    ({"out_features": 0}, "out_features"),
    ({"out_features": -5}, "out_features"),
    ({"codes": W.tiled.codes.to(torch.int8)}, "codes must be"),
    ({"codes": W.tiled.codes.transpose(0, 1)}, "codes must be"),
    ({"codes": torch.cat([W.tiled.codes] * 2, 2)[..., ::2]}, "codes must be contiguous"),
    ({"scale": W.tiled.scale[:1]}, "scale must be"),
    ({"scale": W.tiled.scale.double()}, "scale must be"),
    ({"zero": W.tiled.zero[:, :1]}, "zero must be"),  # type: ignore[index]
    ({"zero": W.tiled.zero.half()}, "zero must"),  # type: ignore[union-attr]
    ({"bias": torch.zeros(32)}, "bias must be"),
    ({"bias": torch.zeros(20).half()}, "bias must be"),
    ({"activation": "swish"}, "activation must be one of"),
    ({"mul": torch.zeros(3, 21)}, "mul must"),
    ({"add": torch.zeros(20)}, "add must"),
    ({"add": torch.zeros(3, 20).half()}, "add must"),
    ({"glu": True}, "codes must be"),
]


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_does_not_fit_is_refused_by_kernel_reference_and_fake(change: dict[str, Any], message: str) -> None:
    from qcompile.kernels.ops.linear_tiled import linear_tiled as reference

    build.ensure_loaded()
    args = {**GOOD, **change}
    meta = {k: _meta(v) if isinstance(v, Tensor) else v for k, v in args.items()}
    attempts: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (OPS.linear_tiled, args),
        (reference, args),
        (OPS.linear_tiled, meta),
    ]
    for function, arguments in attempts:
        with pytest.raises((ValueError, RuntimeError), match=message):
            function(**arguments)


def test_split_and_dequantize_refuse_what_does_not_fit() -> None:
    for sizes in ([], [20, 0], [40]):
        with pytest.raises((ValueError, RuntimeError), match=r"sizes must|codes must"):
            OPS.linear_tiled_split(X, *W.args, None, 4, 32, sizes)
    for rows, cols in ((33, 64), (-1, 64), (20, 65)):
        with pytest.raises((ValueError, RuntimeError), match=r"rows must|codes must"):
            OPS.dequantize_tiled(*W.args, 4, 32, rows, cols, torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="dtype must be"):
        OPS.dequantize_tiled(*W.args, 4, 32, 20, 64, torch.float64)
    with pytest.raises((ValueError, RuntimeError), match="indices must be"):
        OPS.embedding_tiled(torch.zeros(2), *W.args, 4, 32, 20, 64, torch.float32)
