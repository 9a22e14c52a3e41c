"""Regions that run once are written out; what is in branches and loops is named in the report."""

from __future__ import annotations

import pytest
import torch
from harness import Outcome, compile_without_inductor, error, program_of, quantize, tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qcompile.passes.inline_regions import InlineRegions


class Autocast(nn.Module):
    """A region in bfloat16, with one in float32 inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.norm(self.first(x)).relu()
            z = self.last(y)
            with torch.autocast("cpu", enabled=False):
                z = z.float() @ z.float().mT
        return z, y


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.first(x)
        return self.last(y)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=False))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.first(x), lambda x: self.last(x).relu(), (x,))


ROWS = [("linear", "first.weight", (32, 32)), ("linear", "last.weight", (8, 32))]


def _regions(outcome: Outcome) -> list[str]:
    return [op for op in outcome.ops if "wrap" in op or "checkpoint" in op]


@pytest.mark.parametrize("model", [Autocast, NoGrad, Checkpointed])
def test_exported(model: type[nn.Module]) -> None:
    outcome = quantize(model().requires_grad_(False), torch.randn(5, 32))
    assert outcome.quantized == ROWS
    assert not _regions(outcome)
    assert 0 < error(outcome.got, outcome.want) < 0.02
    assert [t.dtype for t in outcome.got] == [t.dtype for t in outcome.want]
    assert error(outcome.lowered(), outcome.got) < 0.01


@pytest.mark.parametrize("model", [Autocast, NoGrad, Checkpointed])
def test_compiled(model: type[nn.Module]) -> None:
    module, x = model().requires_grad_(False), torch.randn(5, 32)
    want = tensors(module(x))
    got, rows = compile_without_inductor(module, x)
    assert [(r.op, r.weight, r.shape) for r in rows if r.quantized] == ROWS
    assert 0 < error(tensors(got), want) < 0.02


def test_same_values_where_nothing_is_quantized() -> None:
    outcome = quantize(Autocast().requires_grad_(False), torch.randn(5, 32), exclude="*")
    assert not outcome.quantized
    assert not _regions(outcome)
    assert error(outcome.got, outcome.want) == 0


def test_regions_stay_where_gradients_flow() -> None:
    program = program_of(Autocast().requires_grad_(False), torch.randn(5, 32))
    program.inference = False
    assert InlineRegions().run(program) == 0
    assert program.calls(torch.ops.higher_order.wrap_with_autocast)


def test_branches_are_reported() -> None:
    outcome = quantize(Branch().requires_grad_(False), torch.randn(5, 32))
    assert outcome.alone == [("linear", "", "inside the body of cond, which is not rewritten")] * 2
    assert error(outcome.got, outcome.want) == 0
