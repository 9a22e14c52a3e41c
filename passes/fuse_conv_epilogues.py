"""What surrounds a convolution element by element is computed where it reads its input and writes its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.passes.base import Pass
from qcompile.passes.fuse_epilogues import ACTIVATIONS
from qcompile.passes.program import Program, is_tensor
from qcompile.passes.rewrite import Bindings, Rule, rewrite
from qcompile.passes.shapes import same_shape
from qcompile.passes.writes import is_written

aten = torch.ops.aten
qc = torch.ops.qcompile

#: Further activation operators that convolutional models use.
HARD: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("relu6", lambda y: aten.hardtanh.default(y, 0.0, 6.0)),
    ("relu6", lambda y: aten.hardtanh_.default(y, 0.0, 6.0)),
    ("relu6", lambda y: aten.hardtanh.default(y, 0, 6)),
    ("relu6", lambda y: aten.hardtanh_.default(y, 0, 6)),
    ("relu6", lambda y: aten.relu6.default(y)),
    ("relu6", lambda y: aten.relu6_.default(y)),
    ("relu6", lambda y: aten.clamp.default(y, 0, 6)),
    ("relu6", lambda y: aten.clamp.default(y, 0.0, 6.0)),
    ("hardswish", lambda y: aten.hardswish.default(y)),
    ("hardswish", lambda y: aten.hardswish_.default(y)),
    ("hardsigmoid", lambda y: aten.hardsigmoid.default(y)),
    ("hardsigmoid", lambda y: aten.hardsigmoid_.default(y)),
    ("silu", lambda y: aten.mul.Tensor(y, aten.sigmoid.default(y))),
    ("silu", lambda y: aten.mul.Tensor(aten.sigmoid.default(y), y)),
)


def _stays(*nodes: object) -> bool:
    """Whether no operator writes to these values, so that they may be read later than they were."""
    return not any(isinstance(node, fx.Node) and is_written(node) for node in nodes)


def _zeros(b: Bindings) -> bool:
    return b.get("mode", "constant") == "constant" and b["value"] in (None, 0)


def _rounded_rules() -> Iterator[Rule]:
    """Zeros are rounded to zeros: what is rounded with them may be rounded without, and they come to the convolution."""

    def where(program: Program, node: fx.Node, b: Bindings) -> bool:
        return _zeros(b) and all(u.target is qc.conv.default for u in node.users) and _stays(b["x"])

    yield Rule(
        "rounded-pad",
        lambda x, edges, mode, value, scale, qtype: qc.fake_quantize.default(
            aten.pad.default(x, edges, mode, value), scale, qtype
        ),
        lambda x, edges, mode, value, scale, qtype: aten.pad.default(
            qc.fake_quantize.default(x, scale, qtype), edges, mode, value
        ),
        where=where,
        shared=(aten.pad.default,),
    )
    yield Rule(
        "rounded-constant-pad",
        lambda x, edges, value, scale, qtype: qc.fake_quantize.default(
            aten.constant_pad_nd.default(x, edges, value), scale, qtype
        ),
        lambda x, edges, value, scale, qtype: aten.constant_pad_nd.default(
            qc.fake_quantize.default(x, scale, qtype), edges, value
        ),
        where=where,
        shared=(aten.constant_pad_nd.default,),
    )


def _pad_rule() -> Rule:
    def plain(program: Program, node: fx.Node, b: Bindings) -> bool:
        axes = len(b["shape"]) - 2
        numbers = all(isinstance(n, int) and n >= 0 for n in b["edges"])
        fits = len(b["edges"]) <= 2 * axes and not any(b["pad"]) and not b["transposed"]
        return numbers and _zeros(b) and fits and _stays(b["x"])

    def replacement(x, edges, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add, after):  # type: ignore[no-untyped-def]
        return qc.conv.default(x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add, after, edges)

    return Rule(
        "pad",
        lambda x, edges, mode, value, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add,
        after, pad: qc.conv.default(
            aten.pad.default(x, edges, mode, value), data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g,
            act, add, after, pad,
        ),
        replacement,
        where=plain,
        shared=(aten.pad.default,),
    )  # fmt: skip


def _constant_pad_rule() -> Rule:
    rule = _pad_rule()

    def plain(program: Program, node: fx.Node, b: Bindings) -> bool:
        return bool(rule.where and rule.where(program, node, {**b, "mode": "constant"}))

    return Rule(
        "constant-pad",
        lambda x, edges, value, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add,
        after, pad: qc.conv.default(
            aten.constant_pad_nd.default(x, edges, value), data, scale, zero, bias, scheme, shape, s, p, d, transposed,
            op, g, act, add, after, pad,
        ),
        rule.replacement,
        where=plain,
        shared=(aten.constant_pad_nd.default,),
    )  # fmt: skip


def _activation_rule(name: str, activation: Callable[[Any], Any]) -> Rule:
    return Rule(
        f"activation-{name}",
        lambda x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add, after, pad: activation(
            qc.conv.default(
                x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add, after, pad
            )
        ),
        lambda x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, pad: qc.conv.default(
            x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, name, None, "none", pad
        ),
        where=lambda program, node, b: b["act"] == "none" and b["add"] is None and _stays(b["x"]),
    )  # fmt: skip


def _after_rule(name: str, activation: Callable[[Any], Any]) -> Rule:
    return Rule(
        f"after-{name}",
        lambda x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add, after, pad: activation(
            qc.conv.default(
                x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add, after, pad
            )
        ),
        lambda x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add, pad: qc.conv.default(
            x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add, name, pad
        ),
        where=lambda program, node, b: b["add"] is not None and b["after"] == "none" and _stays(b["x"], b["add"]),
    )  # fmt: skip


def _fits(node: fx.Node, b: Bindings) -> bool:
    """Whether the operand beside the convolution is a tensor of its result's shape and dtype, and may be read with it."""
    if not is_tensor(b["other"]) or b["add"] is not None:
        return False
    conv = next((a for a in node.args if a is not b["other"]), None)
    if not isinstance(conv, fx.Node):
        return False
    operand, own = b["other"].meta["val"], conv.meta["val"]
    same = operand.dtype == own.dtype and operand.device == own.device
    return same and same_shape(operand.shape, own.shape) and _stays(b["x"])


def _residual_rule(add: Callable[[Any, Any], Any], swap: bool) -> Rule:
    def pattern(x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add_, after, pad, other):  # type: ignore[no-untyped-def]
        y = qc.conv.default(x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, add_, after, pad)
        return add(other, y) if swap else add(y, other)

    return Rule(
        "residual",
        pattern,
        lambda x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, pad, other: qc.conv.default(
            x, data, scale, zero, bias, scheme, shape, s, p, d, transposed, op, g, act, other, "none", pad
        ),
        where=lambda program, node, b: _fits(node, {**b, "add": b["add_"]}),
    )  # fmt: skip


def _rules() -> Iterator[Rule]:
    yield from _rounded_rules()
    yield _pad_rule()
    yield _constant_pad_rule()
    for name, activation in (*ACTIVATIONS, *HARD):
        yield _activation_rule(name, activation)
        yield _after_rule(name, activation)
    yield _residual_rule(lambda y, other: aten.add.Tensor(y, other), swap=False)
    yield _residual_rule(lambda other, y: aten.add.Tensor(other, y), swap=True)
    yield _residual_rule(lambda y, other: aten.add_.Tensor(y, other), swap=False)


RULES = tuple(_rules())


@dataclass(frozen=True)
class FuseConvEpilogues(Pass):
    """Pull into a quantized convolution the zeros around its input, rounded or not, and what its result alone goes through::

        pad ─► conv(x) ─► relu6 ─► add(r) ─► relu   ->   conv(x, pad=…, activation="relu6", add=r, after="relu")

    Before: fused, batch norms folded. After: as before; results are the same up to rounding. Only for inference: the fused
    operator has no gradient formula.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many operators were pulled in."""
        # Without a convolution no rule need be traced.
        if not program.inference or not program.calls(qc.conv.default):
            return 0
        return sum(rewrite(program, RULES).values())
