"""Root mean square norms that are written out become the operator that means them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.passes.base import Pass
from qcompile.passes.program import Program, is_tensor, shape_of, value
from qcompile.passes.remove_identities import plain
from qcompile.passes.shapes import same_size

aten = torch.ops.aten


@dataclass(frozen=True)
class FindNorms(Pass):
    """Give a norm that is spelled in single operators its name::

        x ─┬► pow(2) ─► mean(-1) ─► add(eps) ─► rsqrt ─┐
           └───────────────────────────────────────► mul ─► mul(weight)      ->   rms_norm(x, weight, eps)

    The casts to float32 and back around the norm of a half-precision model go with it: the operator computes in float32 as
    well. The order of factors does not matter, nor does ``x * x`` for ``pow(2)``.

    Before: any graph. After: the same results up to rounding. For inference only, where the passes after it want to know.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many norms were found."""
        if not program.inference:
            return 0
        count = 0
        for node in program.calls(aten.mul.Tensor):
            found = _norm(node)
            if found is None:
                continue
            x, weight, eps = found
            with program.graph.inserting_before(node):
                new = program.call(aten.rms_norm.default, x, [shape_of(x)[-1]], weight, eps, like=node)
            if new.meta["val"].dtype != node.meta["val"].dtype:
                program.graph.erase_node(new)
                continue
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)
            count += 1
        program.clean()
        return count


def _cast(node: Any) -> Any:
    """``node`` without casts of any kind."""
    while isinstance(node, fx.Node) and node.target is aten.to.dtype:
        node = node.args[0]
    return node


def _factors(node: Any) -> list[tuple[Any, Any]]:
    """Both orders of the factors of a product."""
    if not (isinstance(node, fx.Node) and node.target is aten.mul.Tensor):
        return []
    a, b = node.args
    return [(a, b), (b, a)]


def _norm(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """Input, weight and eps of the norm that ends at ``node``."""
    for weight, rest in _factors(node):
        if not is_tensor(weight) or len(shape_of(weight)) != 1:
            continue
        for x, factor in _factors(_cast(rest)):
            found = _mean_square(_cast(factor), x)
            if found is None:
                continue
            width = shape_of(x)[-1]
            source = _cast(x)
            alike = is_tensor(source) and value(source).dtype == value(weight).dtype == value(node).dtype
            if alike and isinstance(width, int) and same_size(shape_of(weight)[0], width):
                return source, weight, found
    return None


def _mean_square(node: Any, x: Any) -> float | None:
    """eps, where ``node`` is ``rsqrt(mean(x * x, -1, keepdim=True) + eps)``."""
    if not (isinstance(node, fx.Node) and node.target is aten.rsqrt.default and is_tensor(x)):
        return None
    total = node.args[0]
    if not (isinstance(total, fx.Node) and total.target is aten.add.Tensor and isinstance(total.args[1], float)):
        return None
    mean = total.args[0]
    if not (isinstance(mean, fx.Node) and mean.target is aten.mean.dim and len(mean.args) > 2 and mean.args[2] is True):
        return None
    if mean.args[1] not in ([-1], [len(shape_of(x)) - 1]) or value(x).dtype != torch.float32:
        return None
    square = mean.args[0]
    if not isinstance(square, fx.Node):
        return None
    powered = square.target is aten.pow.Tensor_Scalar and square.args[1] == 2
    multiplied = square.target is aten.mul.Tensor and square.args[0] is square.args[1]
    return float(total.args[1]) if (powered or multiplied) and plain(square.args[0]) is plain(x) else None
