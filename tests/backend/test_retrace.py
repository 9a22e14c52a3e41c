"""Calls that are like an earlier one are written again, not traced again: the graph is the same to the letter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qcompile import retrace


class Block(nn.Module):
    def __init__(self, size: int, body: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.drop = nn.Dropout(0.5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def _plain(block: Block, x: Tensor) -> Tensor:
    return torch.nn.functional.silu(block.linear(x)) * x + x.mean(-1, keepdim=True)


def _tuples(block: Block, x: Tensor) -> Tensor:
    a, b = block.linear(x).chunk(2, dim=-1)
    top = torch.cat([a * b, b - a], -1).max(-1, keepdim=True)
    return x + top.values + top.indices.to(x.dtype)


def _same_tensor(block: Block, x: Tensor) -> Tensor:
    """``to`` and ``contiguous`` give back what they were given: later readers read another node."""
    y = x.to(torch.float32)
    z = x.contiguous() * y
    return block.linear(z) + x + y


def _twice(block: Block, x: Tensor) -> Tensor:
    """The same tensor for both arguments is another call than two that are alike."""
    y = block.linear(x)
    return y * y + x * y + y * x


def _in_place(block: Block, x: Tensor) -> Tensor:
    y = block.linear(x)
    y.add_(1.0).mul_(x)
    y[..., :3] = 0.5
    return y + x


def _reshaped_in_place(block: Block, x: Tensor) -> Tensor:
    y = block.linear(x)
    y.unsqueeze_(0)
    return (y + 1.0).squeeze(0)


def _random(block: Block, x: Tensor) -> Tensor:
    return block.drop(block.linear(x)) + torch.rand_like(x)


def _constants(block: Block, x: Tensor) -> Tensor:
    return block.linear(x) * torch.tensor([2.0, 3.0] * (x.shape[-1] // 2)) + torch.arange(x.shape[-1])


def _zeros(block: Block, x: Tensor) -> Tensor:
    """0.0 and -0.0, 1 and True and 1.0 are equal, and not the same argument."""
    return torch.where(block.linear(x) > 0, x + 0.0, x + -0.0) + (x + 1) + (x + True) + (x + 1.0)


def _autocast(block: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block.linear(x)
    return block.linear(x) + y.float()


def _gradless(block: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = block.linear(x)
    return block.linear(x) + y


BODIES = [
    _plain, _tuples, _same_tensor, _twice, _in_place, _reshaped_in_place, _random, _constants, _zeros, _autocast, _gradless
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
def test_the_graph_is_that_of_tracing_everything(body, grad, dynamic, monkeypatch):
    pairs = []

    def backend(gm, inputs):
        fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        mode = next(f.fake_mode for f in fakes if isinstance(f, FakeTensor))
        quick = retrace.retrace(gm, fakes, mode)
        with monkeypatch.context() as patch:
            patch.setattr(retrace.Repeats, "__call__", lambda self, call, target, args, kwargs: call(target, args, kwargs))
            pairs.append((quick, retrace.retrace(gm, fakes, mode)))
        return gm.forward

    torch.manual_seed(0)
    model = nn.Sequential(*(Block(8, body) for _ in range(3))).train(body is _random)
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend, dynamic=dynamic)(torch.randn(5, 8))
    assert pairs
    for quick, slow in pairs:
        assert str(quick.graph) == str(slow.graph)
        for a, b in zip(quick.graph.nodes, slow.graph.nodes, strict=True):
            assert set(a.meta) == set(b.meta)
            assert a.stack_trace == b.stack_trace
            assert str(a.meta.get("nn_module_stack")) == str(b.meta.get("nn_module_stack"))
            _like(a.meta.get("val"), b.meta.get("val"))
        for (name, a), (_, b) in zip(quick.named_buffers(), slow.named_buffers(), strict=True):
            assert torch.equal(a, b), name


def _like(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.device, str(a.shape), str(a.stride())) == (b.dtype, b.device, str(b.shape), str(b.stride()))
        assert a.requires_grad == b.requires_grad
    elif isinstance(a, (tuple, list)):
        for x, y in zip(a, b, strict=True):
            _like(x, y)


def test_what_is_alike_is_traced_once(monkeypatch):
    traced = []
    record = retrace.Repeats._record
    monkeypatch.setattr(retrace.Repeats, "_record", lambda self, *a: traced.append(1) or record(self, *a))

    def backend(gm, inputs):
        fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        retrace.retrace(gm, fakes, fakes[0].fake_mode)
        return gm.forward

    counts = []
    for layers in (2, 6):
        traced.clear()
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(nn.Sequential(*(Block(8, _plain) for _ in range(layers))), backend=backend)(torch.randn(5, 8))
        counts.append(len(traced))
    assert counts[0] == counts[1] > 0
