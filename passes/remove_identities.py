"""Operators that give back the very tensor they were given go, so that nothing stands between what can be fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.passes.base import Pass
from qcompile.passes.program import Program, is_tensor, normalized, value

aten = torch.ops.aten

#: Operators of an input and, third, whether the program trains: otherwise they return the input itself.
_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Take out what changes nothing::

        linear ─► dropout(train=False) ─► add        ->   linear ─► add
        x (float32) ─► to(float32) ─► pow            ->   x ─► pow

    Checks of a dtype that can be seen to hold, which export puts before a cast, go as well. Each of these operators returns
    its input, not a copy, so that in-place writes mean the same before and after. One whose value is a result of the
    program stays.

    Before: any graph. After: the same results, bit by bit.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many operators went."""
        count = 0
        for node in program.calls(aten._assert_tensor_metadata.default):
            if _holds(node):
                program.graph.erase_node(node)
                count += 1
        for target in (aten.to.dtype, *_DROPOUTS):
            for node in program.calls(target):
                inner = plain(node)
                if inner is node or any(user.op == "output" for user in node.users):
                    continue
                node.replace_all_uses_with(inner)
                program.graph.erase_node(node)
                count += 1
        return count


def plain(node: Any) -> Any:
    """``node`` without operators that give back the very tensor they were given: casts to its own dtype, and dropout that
    drops nothing."""
    while isinstance(node, fx.Node):
        if node.target in _DROPOUTS and not node.args[2]:
            node = node.args[0]
            continue
        if node.target is not aten.to.dtype:
            break
        args = normalized(node)
        if args["copy"] or not is_tensor(args["self"]) or value(args["self"]).dtype != value(node).dtype:
            break
        node = args["self"]
    return node


def _holds(node: fx.Node) -> bool:
    """Whether a check of a tensor's dtype can be seen to hold."""
    args = normalized(node)
    known = is_tensor(args["a"]) and args["size"] is None and args["stride"] is None
    return known and args["dtype"] in (None, value(args["a"]).dtype)
