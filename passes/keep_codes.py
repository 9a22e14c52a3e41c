"""Between convolutions whose activations have known scales nothing becomes a float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.passes.base import Pass
from qcompile.passes.program import Program, normalized, value
from qcompile.passes.writes import is_written

qc = torch.ops.qcompile

#: Operators that read and write int8 codes of a known scale.
_CONVOLUTIONS = (qc.conv_tiled.default, qc.conv_depthwise.default)


@dataclass(frozen=True)
class KeepCodes(Pass):
    """Let a convolution write the int8 codes that those which read it would make of its result::

        conv_tiled(…) ─┬► conv_tiled(x_scale=s)            conv_tiled(…, out_scale=s) ─┬► conv_tiled(x_scale=s, dtype=…)
                       └► conv_depthwise(x_scale=s)   ->                               └► conv_depthwise(x_scale=s, dtype=…)

    The rounding is the same one, done where the value is made instead of where it is read. A result that anything reads as
    it is, a residual say, stays float.

    Before: packed; only for inference. After: as before, up to how a value halfway between two codes is rounded.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many results are codes now."""
        if not program.inference:
            return 0
        count = 0
        for node in program.calls(*_CONVOLUTIONS):
            scale = _common_scale(node)
            if scale is None or normalized(node)["x_scale"] is None:
                continue
            dtype = value(node).dtype
            _set(program, node, {"out_scale": scale})
            for reader in list(node.users):
                _set(program, reader, {"dtype": dtype})
            count += 1
        return count


def _common_scale(node: fx.Node) -> fx.Node | None:
    """The scale with which all that reads a value rounds it; None where something reads it otherwise."""
    scales: set[fx.Node] = set()
    for reader in node.users:
        args = normalized(reader) if reader.target in _CONVOLUTIONS else {}
        if args.get("x") is not node or args["add"] is node or args["x_scale"] is None:
            return None
        scales.add(args["x_scale"])
    return scales.pop() if len(scales) == 1 and not is_written(node) else None


def _set(program: Program, node: fx.Node, changes: dict[str, Any]) -> None:
    node.args, node.kwargs = tuple({**normalized(node), **changes}.values()), {}
    node.meta["val"] = program.evaluate(node)
