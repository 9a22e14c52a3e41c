"""Inputs that sequences read or write come out of a box instead of being given at each call.

See :mod:`qcompile.kernels.ops.hold`. A front end marks the placeholders of tensors that stay the same ones from call to call
with :data:`HELD`, strided tensors of the CPU, and guards that they do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, fx

from qcompile.kernels.ops.hold import hold
from qcompile.passes.program import Program

#: In the meta of a placeholder: the very tensor that it is in every call.
HELD = "qcompile_held"
#: In the meta of a placeholder: its place among the inputs that the front end brought.
INPUT = "qcompile_input"


class Held(NamedTuple):
    """Where an input is: the placeholder of a box, and the place in it."""

    box: fx.Node
    place: int


def hold_inputs(program: Program, nodes: Iterable[fx.Node]) -> dict[fx.Node, Held]:
    """Put those of the placeholders that may be into one box, a constant of the program; the others are not named."""
    found = {n: n.meta[HELD] for n in nodes if _may_be(n)}
    if len(found) < 2:
        return {}
    box = program.add_constant("held", hold(list(found.values())))
    program.constants[box.name].holds = tuple(n.meta[INPUT] for n in found)
    return {n: Held(box, i) for i, n in enumerate(found)}


def drop_held(program: Program, held: Iterable[fx.Node]) -> None:
    """Drop the placeholders that nothing but boxes gives any more."""
    held = list(held)
    program.drop_unread(held)
    for node in held:
        if not node._erased and not node.users:
            program.graph.erase_node(node)


def _may_be(node: fx.Node) -> bool:
    t = node.meta.get(HELD)
    return node.op == "placeholder" and isinstance(t, Tensor) and t.numel() > 0
