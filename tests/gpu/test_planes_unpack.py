"""Modules that were quantized eagerly for a GPU, captured: the graph is the one that quantizing the float module gives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import error, export, verified
from torch import Tensor, nn
from torch.export import ExportedProgram

import qcompile
from qcompile.capture_export import from_exported
from qcompile.export import lowered
from qcompile.kernels.dispatch import kernels, register, unregister
from qcompile.kernels.triton.target import Target, pretend
from qcompile.passes import pipeline
from qcompile.passes.program import Program


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """The GPU's kernels offered for the CPU, where their operators run by the reference."""
    with pretend(Target("sm_80", 108)):
        added = [register(dataclasses.replace(k, device="cpu")) for k in reversed(kernels(device="cuda"))]
        yield
    for kernel in added:
        unregister(kernel)


class Block(nn.Module):
    """A table that is tied to the head, siblings, a gate, a weight that is read as such."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 64)
        self.q, self.k = nn.Linear(64, 48), nn.Linear(64, 33)
        self.gate, self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False), nn.Linear(96, 64)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> tuple[Tensor, ...]:
        x = self.table(index)
        y = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.q(x), self.k(x), self.head(y), y @ self.down.weight


INDEX = torch.arange(6).view(2, 3)


def model(**options: Any) -> Block:
    torch.manual_seed(0)
    block = Block().eval().requires_grad_(False)
    qcompile.quantize(block, **options)
    qcompile.freeze(block)
    return block


def arrived(ep: ExportedProgram) -> Program:
    program = from_exported(ep)
    pipeline.run(pipeline.arrival(), program, check=True)
    return program


def operators(graph: torch.fx.Graph) -> Counter[str]:
    return Counter(str(n.target) for n in graph.nodes if n.op == "call_function" and "qcompile" in str(n.target))


@pytest.mark.parametrize("weights", ["qint8", "qint4", "qint3", "qint2", "qfloat8", "qfloat8_e5m2"])
def test_it_is_the_graph_of_the_float_module(weights: str) -> None:
    block = model(weights=weights)
    assert "packed for triton-planes" in str(block.down.q_weight)
    want = block(INDEX)
    ep = export(block, INDEX)
    assert any("_planes" in name for name in operators(ep.graph))
    program = arrived(ep)
    found = operators(program.graph)
    assert not any("planes" in name for name in found), found
    assert found["qcompile.linear.default"] == 6 and found["qcompile.embedding.default"] == 1
    (scheme,) = (d.scheme for d in program.decisions if d.weight == "down.weight" and d.op == "linear")
    assert str(scheme) == str(block.down.q_weight.logical().scheme)
    with verified():
        low = lowered(ep)
    packed = operators(low.graph)
    assert packed["qcompile.linear_planes_split.default"] == 1 and packed["qcompile.embedding_planes.default"] == 1
    for got, right in zip(low.module()(INDEX), want, strict=True):
        assert error(got, right) < 1e-5


def test_what_is_packed_by_itself_is_packed_once() -> None:
    block = model(weights="qint4")
    program = arrived(export(block, INDEX))
    pipeline.run(pipeline.lowering(), program, check=True)
    held = {t.data_ptr() for t in block.down.q_weight.buffers() if t.dtype == torch.int16}
    assert len(held) == 1 and held <= {c.tensor.data_ptr() for c in program.constants.values()}


def test_rounded_activations_are_multiplied_as_codes() -> None:
    block = model(weights="qint8", activations="qint8")
    with torch.no_grad():
        want = block(INDEX)
    with verified():
        low = lowered(export(block, INDEX))
    assert operators(low.graph)["qcompile.linear_quantized.default"] >= 2
    for got, right in zip(low.module()(INDEX), want, strict=True):
        assert error(got, right) < 5e-3
