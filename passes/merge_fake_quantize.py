"""One tensor that is rounded twice in the same way is rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qcompile.passes.base import Pass
from qcompile.passes.program import Constant, Program, normalized
from qcompile.passes.writes import is_written

qc = torch.ops.qcompile


@dataclass(frozen=True)
class MergeFakeQuantize(Pass):
    """Round an activation once for all products that read it rounded to the same numbers::

              ┌► fake_quantize(s1) ► linear(q)                                 ┌► linear(q)
        x ────┼► fake_quantize(s2) ► linear(k)     ->  x ─► fake_quantize(s) ──┼► linear(k)      where s1 = s2 = s
              └► fake_quantize_dynamic ► …             └► fake_quantize_dynamic └► …

    Modules that read one tensor have each calibrated a scale of their own, on the same values. Scales are compared by value,
    if they are constants; then the products read one tensor, and :class:`~qcompile.passes.fuse_siblings.FuseSiblings` finds
    them.

    Before: any graph. After: no two of these operators with one input, which nothing writes to, have the same result.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many operators went."""
        groups: dict[tuple[object, ...], list[fx.Node]] = {}
        for node in program.calls(qc.fake_quantize.default, qc.fake_quantize_dynamic.default):
            args = normalized(node)
            if is_written(args["x"]):
                continue
            scale = _scale(program, args["scale"]) if "scale" in args else None
            groups.setdefault((node.target, args["x"], args["qtype"], scale), []).append(node)
        merged = 0
        for first, *others in groups.values():
            if others:
                self._merge(program, first, others)
                merged += len(others)
        program.clean()
        return merged

    def _merge(self, program: Program, first: fx.Node, others: list[fx.Node]) -> None:
        scales = {n.args[1] for n in (first, *others)} if first.target is qc.fake_quantize.default else set()
        if len(scales) > 1:
            # A constant of its own: that the scales are equal holds for as long as none of them is written to, which the
            # front end sees to for constants that the program does not read any more.
            constant = _constant(program, first.args[1])
            shared = program.add_constant(f"{constant.name}_shared", constant.tensor.detach().clone())
            first.args = (first.args[0], shared, *first.args[2:])
        for node in others:
            node.replace_all_uses_with(first)
            program.graph.erase_node(node)


def _scale(program: Program, node: fx.Node) -> object:
    """What two scales must have in common: their value, where it is known, else the node."""
    constant = program.constant(node)
    if constant is None or constant.mutated or constant.receives_grad or constant.tensor.is_meta:
        return node
    return constant.tensor.dtype, float(constant.tensor)


def _constant(program: Program, node: object) -> Constant:
    constant = program.constant(node)
    if constant is None:
        raise TypeError(f"{node} is no constant")
    return constant
