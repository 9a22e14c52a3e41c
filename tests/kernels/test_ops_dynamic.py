"""The operators under ``torch.compile`` with dynamic shapes and under ``torch.export``: one graph for all sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.ops.conv import rows_of

ops = torch.ops.qcompile
TEXT, BYTES = "qint4/group=16/affine/float16", "qint8/channel=0/symmetric/float32"


def _parts(q: QTensor) -> tuple[Any, ...]:
    return q.data, q.scale, q.zero


def _linear() -> Callable[[torch.Tensor], torch.Tensor]:
    q, bias = QTensor.quantize(oracle.data(9, 33), Scheme.parse(TEXT)), oracle.data(9)
    return lambda x: torch.relu(ops.linear(x * 2, *_parts(q), bias, TEXT, [9, 33]))


def _split() -> Callable[[torch.Tensor], torch.Tensor]:
    q = QTensor.quantize(oracle.data(9, 33), Scheme.parse(TEXT))

    def run(x: torch.Tensor) -> torch.Tensor:
        a, b = ops.linear_split(x, *_parts(q), None, TEXT, [9, 33], [4, 5])
        return torch.cat([a, b * 2], -1)

    return run


def _linear_quantized() -> Callable[[torch.Tensor], torch.Tensor]:
    q, x_text = QTensor.quantize(oracle.data(9, 33), Scheme.parse(BYTES)), "qint8/group=33/symmetric/float32"

    def run(x: torch.Tensor) -> torch.Tensor:
        codes, scale = ops.quantize_dynamic(x, x_text)
        return ops.linear_quantized(codes, scale, q.data, q.scale, None, x_text, BYTES, [9, 33], x.dtype)

    return run


def _static() -> Callable[[torch.Tensor], torch.Tensor]:
    text, scale = "qint8/tensor/symmetric/float32", torch.tensor(0.1)

    def run(x: torch.Tensor) -> torch.Tensor:
        codes = ops.quantize(x, scale, None, text)
        return ops.dequantize(codes, scale, None, text, list(x.shape), torch.float32)

    return run


def _grouped() -> Callable[[torch.Tensor], torch.Tensor]:
    q, ends = QTensor.quantize(oracle.data(3, 9, 33), Scheme.parse(TEXT)), torch.tensor([1, 2, 3], dtype=torch.int32)
    return lambda x: ops.grouped_linear(x, *_parts(q), ends, TEXT, [3, 9, 33])


def _conv() -> Callable[[torch.Tensor], torch.Tensor]:
    weight = oracle.data(6, 1, 5)
    q = QTensor.quantize(rows_of(weight, False, 1), Scheme.parse(BYTES))
    return lambda x: ops.conv(x[:, None], *_parts(q), None, BYTES, [6, 1, 5], [2], [1], [1], False, [0], 1)


def _embedding() -> Callable[[torch.Tensor], torch.Tensor]:
    q = QTensor.quantize(oracle.data(11, 33), Scheme.parse(TEXT))
    return lambda x: ops.embedding(x.argmax(-1) % 11, *_parts(q), TEXT, [11, 33], torch.float32)


CASES = {f.__name__.strip("_"): f for f in (_linear, _split, _linear_quantized, _static, _grouped, _conv, _embedding)}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_every_batch(name: str) -> None:
    run, graphs = CASES[name](), 0

    def count(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return gm.forward

    compiled = torch.compile(run, backend=count, dynamic=True, fullgraph=True)
    # 13 is no size of a weight: Dynamo takes equal sizes for the same symbol, and a weight's are fixed
    for rows in (13, 7, 3, 12):
        x = oracle.data(rows, 33, seed=rows)
        torch.testing.assert_close(compiled(x), run(x))
    assert graphs == 1


@pytest.mark.parametrize("name", CASES)
def test_through_aot_autograd(name: str) -> None:
    run = CASES[name]()
    compiled = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (5, 7):
        x = oracle.data(rows, 33, seed=rows)
        torch.testing.assert_close(compiled(x), run(x))


@pytest.mark.parametrize("name", CASES)
def test_export_with_a_dynamic_batch(name: str) -> None:
    run = CASES[name]()

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run(x)

    program = torch.export.export(Model(), (oracle.data(5, 33),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "torch.ops.qcompile." in program.graph_module.code
    for rows in (5, 8, 2):
        x = oracle.data(rows, 33, seed=rows)
        torch.testing.assert_close(program.module()(x), run(x))


@pytest.mark.parametrize("name", ["linear", "split", "grouped", "conv"])
def test_gradients_through_aot_autograd(name: str) -> None:
    run = CASES[name]()
    compiled = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (5, 7):
        x = oracle.data(rows, 33, seed=rows).requires_grad_()
        want, got = run(x), compiled(x)
        grad = torch.randn_like(want)
        torch.testing.assert_close(torch.autograd.grad(got, [x], grad), torch.autograd.grad(want, [x], grad))
