"""What follows a linear is computed in it where nothing else sees the value between, and stays where something does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import error, operators, program_of, tensors
from torch import Tensor, nn

from qcompile.options import Options
from qcompile.passes.fuse_epilogues import RULES, FuseEpilogues, has_epilogue
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.pipeline import run
from qcompile.passes.program import Program

qc = torch.ops.qcompile


class Around(nn.Module):
    """A function of a linear layer and an input."""

    def __init__(self, forward: Callable[..., Any], features: int = 32) -> None:
        super().__init__()
        self.linear, self.up = nn.Linear(32, features), nn.Linear(32, features)
        self.forward_ = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.forward_(self, *inputs)


def _fused(forward: Callable[..., Any], *inputs: Tensor, inference: bool = True) -> tuple[Program, int]:
    """Quantize, merge siblings, fuse epilogues; results must stay the same."""
    program = program_of(Around(forward).to(inputs[0].dtype).requires_grad_(False), *inputs)
    passes = Options.parse({"min_elements": 0}).quantization()
    run([*passes, FuseSiblings()], program, check=True)
    want = _call(program, inputs)
    program.inference = inference
    (result,) = run([FuseEpilogues()], program, check=True)
    assert error(_call(program, inputs), want) < (1e-6 if inputs[0].dtype == torch.float32 else 1e-2)
    return program, result.matches


def _call(program: Program, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    given = iter(inputs)
    held = [program.constant(n) for n in program.graph.find_nodes(op="placeholder")]
    return tensors(program.module(*(next(given) if c is None else c.tensor for c in held)))


def _epilogue(program: Program) -> dict[str, object]:
    """The epilogue of the only linear, which is the only operator."""
    (node,) = program.calls()
    assert node.target is qc.linear.default
    names = [a.name for a in qc.linear.default._schema.arguments]
    values = dict(zip(names, node.args, strict=False))
    return {k: values.get(k) for k in ("activation", "mul", "add", "glu") if values.get(k) not in (None, "none", False)}


X = torch.randn(2, 3, 32)
SQUARE = torch.randn(3, 32)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("relu", F.relu), ("relu", lambda y: y.relu_()), ("gelu", F.gelu),
        ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")), ("silu", F.silu),
        ("silu", lambda y: F.silu(y, inplace=True)), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation(name: str, activation: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    program, matches = _fused(lambda m, x: activation(m.linear(x)), X.to(dtype))
    assert (matches, _epilogue(program)) == (1, {"activation": name})


@pytest.mark.parametrize("swap", [False, True])
def test_product_with_a_tensor(swap: bool) -> None:
    program, _ = _fused(lambda m, x, g: g * m.linear(x) if swap else m.linear(x) * g, X, X)
    assert set(_epilogue(program)) == {"mul"}


@pytest.mark.parametrize("swap", [False, True])
def test_residual(swap: bool) -> None:
    program, _ = _fused(lambda m, x: x + m.linear(x) if swap else m.linear(x) + x, X)
    assert set(_epilogue(program)) == {"add"}


def test_activation_product_and_residual() -> None:
    program, matches = _fused(lambda m, x, g: F.silu(m.linear(x)) * g + x, X, X)
    assert matches == 3
    assert _epilogue(program)["activation"] == "silu"
    assert set(_epilogue(program)) == {"activation", "mul", "add"}


@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "sigmoid"])
def test_gate_and_up(name: str, up_first: bool) -> None:
    activation = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid}[name]

    def forward(m: Any, x: Tensor) -> Tensor:
        gate, up = activation(m.linear(x)), m.up(x)
        return up * gate if up_first else gate * up

    program, _ = _fused(forward, X)
    assert _epilogue(program) == {"activation": name, "glu": True}


def test_flattened_around() -> None:
    program, _ = _fused(lambda m, x: m.linear(x.view(-1, 32)).view(2, 3, 32), X)
    assert _epilogue(program) == {}


ALONE: dict[str, Callable[..., Any]] = {
    "the value between is a result": lambda m, x: (lambda y: (y, y.relu()))(m.linear(x)),
    "the value between is read twice": lambda m, x: (lambda y: y.relu() + y.sum())(m.linear(x)),
    "an activation that no kernel knows": lambda m, x: F.elu(m.linear(x)),
    "gelu of another form than its name": lambda m, x: F.hardswish(m.linear(x)),
    "product with a number": lambda m, x: m.linear(x) * 2.0,
    "product with itself": lambda m, x: (lambda y: y * y)(m.linear(x)),
    "a row for all": lambda m, x: m.linear(x) + x[:, :1],
    "a wider result": lambda m, x: m.linear(x) + x.unsqueeze(0),
    "a wider dtype": lambda m, x: m.linear(x) + x.double(),
    "a scaled sum": lambda m, x: torch.add(m.linear(x), x, alpha=2),
    "views that do more": lambda m, x: m.linear(x.view(-1, 32)).view(3, 2, 32),
    "views of another width": lambda m, x: m.linear(x.view(-1, 32)).view(2, 3, 4, 8),
}


@pytest.mark.parametrize("why", ALONE)
def test_stays(why: str) -> None:
    program, matches = _fused(ALONE[why], X)
    assert matches == 0
    assert not any(has_epilogue(n) for n in program.calls(qc.linear.default))


def test_residual_after_residual_is_one() -> None:
    program, matches = _fused(lambda m, x: m.linear(x) + x + x, X)
    assert matches == 1
    assert operators(program.module) == {"qcompile.linear": 1, "aten.add.Tensor": 1}


def test_product_after_residual_stays() -> None:
    program, matches = _fused(lambda m, x: (m.linear(x) + x) * x, X)
    assert matches == 1
    assert operators(program.module) == {"qcompile.linear": 1, "aten.mul.Tensor": 1}


def test_activation_after_residual_stays() -> None:
    program, _ = _fused(lambda m, x: (m.linear(x) + x).relu(), X)
    assert operators(program.module) == {"qcompile.linear": 1, "aten.relu": 1}


def test_gate_of_unequal_widths_or_order_stays() -> None:
    program, _ = _fused(lambda m, x: m.linear(x) * F.silu(m.linear(x)), X)
    assert operators(program.module)["qcompile.linear"] == 2


def test_a_result_that_something_writes_to_in_between() -> None:
    # The residual is changed after the linear reads it but before the sum: the sum must see the change.
    def forward(m: Any, x: Tensor) -> Tensor:
        r = x.clone()
        y = m.linear(x)
        r.add_(1)
        return y + r

    _fused(forward, X)


def test_not_where_gradients_flow() -> None:
    program, matches = _fused(lambda m, x: F.relu(m.linear(x)) + x, X, inference=False)
    assert matches == 0
    assert operators(program.module) == {"qcompile.linear": 1, "aten.relu": 1, "aten.add.Tensor": 1}


def test_every_kind_of_rule_is_tested() -> None:
    kinds = {rule.name.partition("-")[0] for rule in RULES}
    assert kinds == {"flattened", "gate", "activation", "product", "residual"}
