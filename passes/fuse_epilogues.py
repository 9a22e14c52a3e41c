"""What follows a linear element by element is computed where its result is written."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.passes.base import Pass
from qcompile.passes.program import Program, is_tensor, normalized
from qcompile.passes.rewrite import Bindings, Rule, rewrite
from qcompile.passes.shapes import same_shape

aten = torch.ops.aten
qc = torch.ops.qcompile

#: Activation operators by the name that the fused operator knows them by.
ACTIVATIONS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("relu", lambda y: aten.relu.default(y)),
    ("relu", lambda y: aten.relu_.default(y)),
    ("gelu", lambda y: aten.gelu.default(y)),
    ("gelu_tanh", lambda y: aten.gelu.default(y, approximate="tanh")),
    ("silu", lambda y: aten.silu.default(y)),
    ("silu", lambda y: aten.silu_.default(y)),
    ("sigmoid", lambda y: aten.sigmoid.default(y)),
    ("tanh", lambda y: aten.tanh.default(y)),
)

FLATTENS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _plain(b: Bindings) -> bool:
    return b["act"] == "none" and b["mul"] is None and b["add"] is None and not b["glu"]


def _activation_rule(name: str, activation: Callable[[Any], Any]) -> Rule:
    return Rule(
        f"activation-{name}",
        lambda x, data, scale, zero, bias, scheme, shape, act, mul, add, glu: activation(
            qc.linear.default(x, data, scale, zero, bias, scheme, shape, act, mul, add, glu)
        ),
        lambda x, data, scale, zero, bias, scheme, shape: qc.linear.default(x, data, scale, zero, bias, scheme, shape, name),
        where=lambda program, node, b: _plain(b),
    )


def _gate_rule(name: str, activation: Callable[[Any], Any], up_first: bool) -> Rule:
    def pattern(x, data, scale, zero, bias, scheme, shape, sizes):  # type: ignore[no-untyped-def]
        split = qc.linear_split.default(x, data, scale, zero, bias, scheme, shape, sizes)
        gate, up = activation(operator.getitem(split, 0)), operator.getitem(split, 1)
        return aten.mul.Tensor(up, gate) if up_first else aten.mul.Tensor(gate, up)

    return Rule(
        f"gate-{name}",
        pattern,
        lambda x, data, scale, zero, bias, scheme, shape: qc.linear.default(
            x, data, scale, zero, bias, scheme, shape, name, None, None, True
        ),
        where=lambda program, node, b: len(b["sizes"]) == 2 and b["sizes"][0] == b["sizes"][1],
    )


def _fits(node: fx.Node, b: Bindings) -> bool:
    """Whether the operand beside the linear can be one of its epilogue: a tensor of the linear's own shape and dtype."""
    other, linear = b["other"], next((a for a in node.args if a is not b["other"]), None)
    if not is_tensor(other) or linear is None:
        return False
    operand, own, x = other.meta["val"], linear.meta["val"], b["x"].meta["val"]  # type: ignore[union-attr]
    same = operand.dtype == own.dtype == x.dtype and operand.device == own.device
    return same and same_shape(operand.shape, own.shape)


def _product_rule(swap: bool) -> Rule:
    def pattern(x, data, scale, zero, bias, scheme, shape, act, mul, add, glu, other):  # type: ignore[no-untyped-def]
        y = qc.linear.default(x, data, scale, zero, bias, scheme, shape, act, mul, add, glu)
        return aten.mul.Tensor(other, y) if swap else aten.mul.Tensor(y, other)

    return Rule(
        "product",
        pattern,
        lambda x, data, scale, zero, bias, scheme, shape, act, glu, other: qc.linear.default(
            x, data, scale, zero, bias, scheme, shape, act, other, None, glu
        ),
        where=lambda program, node, b: b["mul"] is None and b["add"] is None and _fits(node, b),
    )


def _residual_rule(swap: bool) -> Rule:
    def pattern(x, data, scale, zero, bias, scheme, shape, act, mul, add, glu, other):  # type: ignore[no-untyped-def]
        y = qc.linear.default(x, data, scale, zero, bias, scheme, shape, act, mul, add, glu)
        return aten.add.Tensor(other, y) if swap else aten.add.Tensor(y, other)

    return Rule(
        "residual",
        pattern,
        lambda x, data, scale, zero, bias, scheme, shape, act, mul, glu, other: qc.linear.default(
            x, data, scale, zero, bias, scheme, shape, act, mul, other, glu
        ),
        where=lambda program, node, b: b["add"] is None and _fits(node, b),
    )


def _flatten_rule(before: Callable[[Any, Any], Any], after: Callable[[Any, Any], Any]) -> Rule:
    def same_leading(program: Program, node: fx.Node, b: Bindings) -> bool:
        want = [*b["x"].meta["val"].shape[:-1], b["shape"][0]]
        return same_shape(node.meta["val"].shape, want)

    return Rule(
        "flattened",
        lambda x, flat, data, scale, zero, bias, scheme, shape, full: after(
            qc.linear.default(before(x, flat), data, scale, zero, bias, scheme, shape), full
        ),
        lambda x, data, scale, zero, bias, scheme, shape: qc.linear.default(x, data, scale, zero, bias, scheme, shape),
        where=same_leading,
        shared=FLATTENS,
    )


def _rules() -> Iterator[Rule]:
    for before in FLATTENS:
        for after in FLATTENS:
            yield _flatten_rule(before, after)
    for name, activation in ACTIVATIONS:
        yield _gate_rule(name, activation, up_first=False)
        yield _gate_rule(name, activation, up_first=True)
        yield _activation_rule(name, activation)
    for swap in (False, True):
        yield _product_rule(swap)
        yield _residual_rule(swap)


RULES = tuple(_rules())


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Pull into a linear what its result alone goes through::

        linear(x) ─► silu ─► mul(u) ─► add(r)      ->   linear(x, activation="silu", mul=u, add=r)
        linear_split(x) ─► [0] ─► silu ─► mul([1]) ->   linear(x, activation="silu", glu=True)
        view ─► linear ─► view                     ->   linear, where the views only merge leading axes

    The result then goes through memory once. Activations: relu, gelu (exact and tanh), silu, sigmoid, tanh.

    Before: fused linears and siblings. After: as before; results are the same up to rounding. Only for inference: the
    fused operators have no gradient formula.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many operators were pulled in."""
        if not program.inference:
            return 0
        return sum(rewrite(program, RULES).values())


def has_epilogue(node: fx.Node) -> bool:
    """Whether a fused linear computes more than ``x @ W.T + bias``."""
    args = normalized(node)
    return args["activation"] != "none" or args["mul"] is not None or args["add"] is not None or bool(args["glu"])
