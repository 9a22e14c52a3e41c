"""Norms are found however they are written, and linears over few rows that follow one another become one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import error, export, quantize, tensors, ungathered, verified
from torch import Tensor, nn
from torch.export import Dim

from qcompile.capture_export import from_exported, to_exported
from qcompile.export import lowered
from qcompile.options import Options
from qcompile.passes.find_norms import FindNorms
from qcompile.passes.remove_identities import RemoveIdentities

EPS = 1e-5


def usual(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return w * wide.to(x.dtype)


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "usual": usual,
    "weight last": lambda x, w: x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS) * w,
    "x * x": lambda x, w: torch.rsqrt((x * x).mean(dim=2, keepdim=True) + EPS) * x * w,
    "by name": lambda x, w: nn.functional.rms_norm(x, x.shape[-1:], w, EPS),
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean of another axis": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w,
    "of something else": lambda x, w: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + EPS) * w,
    "cubes": lambda x, w: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS) * w,
    "layer norm": lambda x, w: nn.functional.layer_norm(x, x.shape[-1:], w),
}


class Normed(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.rand(64) + 0.5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.parametrize("name", [*SPELLINGS, *OTHERS])
def test_norms(name: str) -> None:
    model = Normed({**SPELLINGS, **OTHERS}[name]).eval().requires_grad_(False)
    x = 3 * torch.randn(2, 5, 64)
    ep = export(model, x)
    program = from_exported(ep)
    RemoveIdentities().run(program)
    FindNorms().run(program)
    program.recompile()
    names = [str(n.target) for n in program.calls()]
    assert (names == ["aten.rms_norm.default"]) == (name in SPELLINGS)
    assert error([to_exported(program, ep).module()(x)], [model(x)]) < 1e-6


def test_a_norm_in_half_precision() -> None:
    model = Normed(usual).eval().requires_grad_(False).to(torch.bfloat16)
    x = torch.randn(2, 5, 64).to(torch.bfloat16)
    ep = export(model, x)
    program = from_exported(ep)
    RemoveIdentities().run(program)
    assert FindNorms().run(program) == 1
    program.recompile()
    assert error([to_exported(program, ep).module()(x)], [model(x)]) < 0.01


def test_a_copy_is_no_cast_that_changes_nothing() -> None:
    """What is written to afterwards is the original."""

    class Copied(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 2
            return y.to(torch.float32, copy=True), y.add_(1)

    x = torch.randn(3, 4)
    ep = export(Copied(), x)
    program = from_exported(ep)
    RemoveIdentities().run(program)
    FindNorms().run(program)
    program.recompile()
    got = to_exported(program, ep).module()(x)
    assert torch.equal(got[0], x * 2) and torch.equal(got[1], x * 2 + 1)


class Layer(nn.Module):
    """Attention of a token over itself, and a gated feed-forward, twice."""

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor] = usual, biased: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.weights = nn.ParameterList([nn.Parameter(torch.rand(64) + 0.5) for _ in range(4)])
        self.q, self.k, self.v, self.o = (nn.ModuleList(nn.Linear(64, 64, biased) for _ in range(2)) for _ in range(4))
        self.gate, self.up = (nn.ModuleList(nn.Linear(64, 96, biased) for _ in range(2)) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(96, 64, biased) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            y = self.norm(x, self.weights[2 * i])
            q, k, v = (p[i](y).unflatten(-1, (4, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.o[i](y)
            y = self.norm(x, self.weights[2 * i + 1])
            x = x + self.down[i](nn.functional.silu(self.gate[i](y)) * self.up[i](y))
        return x


def chains(model: nn.Module, *inputs: Any, exact: bool = False, dynamic: Any = None) -> list[list[int]]:
    """The parts of the stages of each chain; the program's results are compared on the way."""
    from qcompile.kernels.ops.linear_chain import read_stages

    outcome = quantize(model.eval().requires_grad_(False), *inputs, weights="qint8", dynamic_shapes=dynamic)
    with verified(), ungathered():
        low = lowered(outcome.qep, Options.parse({"exact": exact}))
    assert error(tensors(low.module()(*inputs)), outcome.want) < 0.02
    found = [n for n in low.graph.nodes if n.target is torch.ops.qcompile.linear_chain.default]
    quantized = [r for r in outcome.rows if r.quantized]
    assert {r.kernel for r in quantized} == {"cpu-tiled"}
    return [[len(s.parts) for s in read_stages(n.args[2], len(n.args[3]))] for n in found]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("norm", [usual, SPELLINGS["by name"], OTHERS["layer norm"]])
def test_a_transformer(norm: Any, biased: bool) -> None:
    x = torch.randn(1, 1, 64)
    # norm and q, k, v; then what lies between two attentions; then the rest
    assert chains(Layer(norm, biased), x) == [[3], [1, 1, 1, 3], [1, 1, 1]]


def test_without_a_norm_that_is_known() -> None:
    assert chains(Layer(OTHERS["cubes"]), torch.randn(1, 2, 64)) == [[1, 1], [1, 1]]  # gate and up, down


class Encoder(nn.Module):
    """Norms after the sums, which are read by linears and by the next sum, and dropout that drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down, self.drop = nn.Linear(64, 96), nn.Linear(96, 64), nn.Dropout(0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = (p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = self.norms[0](x + self.drop(self.o(y)))
            x = self.norms[1](x + self.drop(self.down(nn.functional.gelu(self.up(x)))))
        return x


def test_norms_that_others_read_are_stages() -> None:
    assert chains(Encoder(), torch.randn(1, 3, 64)) == [[1, 1, 1, 1, 1, 3], [1, 1, 1, 1, 1]]


def test_identities_go_and_what_changes_something_stays() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = nn.functional.dropout(x * 2, 0.5, training=False)
            z = y.to(torch.float32).add_(1)  # the very tensor that y is
            return y, z, x.to(torch.float64), nn.functional.dropout(x, 1.0, training=True)

    x = torch.randn(3, 4)
    ep = export(Odd(), x)
    program = from_exported(ep)
    assert RemoveIdentities().run(program) >= 1
    program.recompile()
    names = [str(n.target) for n in program.calls()]
    assert names.count("aten.dropout.default") == names.count("aten.to.dtype") == 1, names
    for got, want in zip(to_exported(program, ep).module()(x), Odd()(x), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


def test_many_rows_unknown_rows_and_float_activations_are_left_alone() -> None:
    assert chains(Layer(), torch.randn(1, 8, 64)) != []
    assert chains(Layer(), torch.randn(1, 9, 64)) == []
    assert chains(Layer(), torch.randn(1, 4, 64), exact=True) == []
    assert chains(Layer(), torch.randn(1, 4, 64), dynamic=({1: Dim("length")},)) == []


class Pair(nn.Module):
    def __init__(self, middle: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.middle = nn.Linear(64, 96), nn.Linear(96, 64), middle
        self.register_buffer("kept", torch.zeros(96))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.relu(self.first(x))
        other = self.middle(y, self.kept)
        return self.second(y), other


def after(y: Tensor, kept: Tensor) -> Tensor:
    return y


def before(y: Tensor, kept: Tensor) -> Tensor:
    return y.exp() * 0.01


def writing(y: Tensor, kept: Tensor) -> Tensor:
    return kept.add_(1)


@pytest.mark.parametrize(("middle", "want"), [(after, [[1, 1]]), (before, []), (writing, [])])
def test_what_stands_between(middle: Any, want: list[list[int]]) -> None:
    assert chains(Pair(middle), torch.randn(2, 64)) == want


class FromOneNorm(nn.Module):
    """A normalized value that another operator reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.weight = nn.Linear(64, 64), nn.Linear(64, 32), nn.Parameter(torch.rand(64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = usual(self.first(x), self.weight)
        return self.second(y), y.cos()


def test_a_norm_with_other_readers() -> None:
    assert chains(FromOneNorm(), torch.randn(2, 64)) == [[1]]  # the second, which norms for itself


def test_compiled() -> None:
    torch._dynamo.reset()
    model, x = Layer().eval().requires_grad_(False), torch.randn(1, 1, 64)
    want = model(x)
    with torch.no_grad():
        got = torch.compile(model, backend="qcompile", options={"min_elements": 0})(x)
    assert error([got], [want]) < 0.02


def test_a_program_with_gradients_is_left_alone() -> None:
    model, x = Normed(usual), torch.randn(2, 5, 64)
    program = from_exported(torch.export.export(model, (x,)))
    program.inference = False
    assert FindNorms().run(program) == 0
