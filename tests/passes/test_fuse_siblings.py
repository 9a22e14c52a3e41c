"""Linears of one input become one, found from the graph; others stay by themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from harness import error, operators, program_of, tensors
from torch import Tensor, nn

from qcompile.options import Options
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.pipeline import run
from qcompile.passes.program import Program


class Siblings(nn.Module):
    """Linears of the given widths that read one input."""

    def __init__(self, *widths: int, bias: bool = True, columns: int = 32) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(columns, n, bias=bias) for n in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


def _quantized(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Program, Counter[str]]:
    """A quantized program; each sibling pass is checked to leave results as they were."""
    program = program_of(model.requires_grad_(False), *inputs)
    run(Options.parse({"min_elements": 0, **options}).quantization(), program, check=True)
    return program, operators(program.module)


def _merged(model: nn.Module, *inputs: Tensor, merger: FuseSiblings | None = None, **options: Any) -> Counter[str]:
    program, _ = _quantized(model, *inputs, **options)
    want = _call(program, inputs)
    matches = run([merger or FuseSiblings()], program, check=True)[0].matches
    ops = operators(program.module)
    assert matches == ops["qcompile.linear_split"]
    assert error(_call(program, inputs), want) < 1e-6
    return ops


def _call(program: Program, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    given = iter(inputs)
    held = [program.constant(n) for n in program.graph.find_nodes(op="placeholder")]
    return tensors(program.module(*(next(given) if c is None else c.tensor for c in held)))


@pytest.mark.parametrize("weights", ["qint8", "qint4", "qfloat8"])
@pytest.mark.parametrize("bias", [False, True])
def test_three_of_different_widths(weights: str, bias: bool) -> None:
    ops = _merged(Siblings(24, 8, 8, bias=bias), torch.randn(2, 3, 32), weights=weights)
    assert (ops["qcompile.linear_split"], ops["qcompile.linear"]) == (1, 0)


def test_the_stacked_weight_replaces_its_parts() -> None:
    program, _ = _quantized(Siblings(24, 8), torch.randn(3, 32))
    FuseSiblings().run(program)
    names = {c.name for c in program.constants.values()}
    assert names == {f"parts.0.{n}+parts.1.{n}" for n in ("weight_data", "weight_scale", "bias")}


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.last(y)


def test_two_inputs() -> None:
    ops = _merged(Inputs(), torch.randn(3, 32), torch.randn(3, 32))
    assert (ops["qcompile.linear_split"], ops["qcompile.linear"]) == (0, 2)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def test_one_after_the_other() -> None:
    ops = _merged(Chain(), torch.randn(3, 32))
    assert (ops["qcompile.linear_split"], ops["qcompile.linear"]) == (0, 2)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.part(x), self.part(x).relu()


def test_one_weight_twice_is_not_stacked_with_itself() -> None:
    ops = _merged(Twice(), torch.randn(3, 32))
    assert (ops["qcompile.linear_split"], ops["qcompile.linear"]) == (0, 2)


def test_some_with_bias() -> None:
    model = Siblings(8, 8, 8, 8)
    model.parts[1].bias = model.parts[3].bias = None
    ops = _merged(model, torch.randn(3, 32))
    assert (ops["qcompile.linear_split"], ops["qcompile.linear"]) == (2, 0)


def test_one_left_in_float() -> None:
    ops = _merged(Siblings(8, 8, 8), torch.randn(3, 32), exclude="parts.1")
    assert (ops["qcompile.linear_split"], ops["aten.linear"]) == (1, 1)


def test_another_scheme() -> None:
    model = Siblings(8, 8)
    with torch.no_grad():
        model.parts[1].weight.mul_(1e7)  # a scale beyond float16: this weight gets a scale in float32
    ops = _merged(model, torch.randn(3, 32), weights="qint4")
    assert (ops["qcompile.linear_split"], ops["qcompile.linear"]) == (0, 2)


def test_large_ones_stay() -> None:
    ops = _merged(Siblings(64, 8, 8), torch.randn(3, 32), merger=FuseSiblings(max_rows=32))
    assert (ops["qcompile.linear_split"], ops["qcompile.linear"]) == (1, 1)


def test_not_where_gradients_flow() -> None:
    program, before = _quantized(Siblings(8, 8), torch.randn(3, 32))
    program.inference = False
    assert FuseSiblings().run(program) == 0
    assert operators(program.module) == before
