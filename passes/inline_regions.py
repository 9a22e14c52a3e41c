"""Bodies that run exactly once, such as those of ``with torch.autocast(...)``, come to stand in the graph around them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.passes.base import Pass
from qcompile.passes.program import Program, inherit

aten = torch.ops.aten
higher_order = torch.ops.higher_order

#: Operators that run a body once, on their operands, and change no value by it where no gradient flows.
ONCE = frozenset({
    higher_order.wrap_with_autocast, higher_order.wrap_with_set_grad_enabled, higher_order.tag_activation_checkpoint,
    higher_order.wrap_activation_checkpoint, higher_order.wrap,
})  # fmt: skip


@dataclass(frozen=True)
class InlineRegions(Pass):
    """Put the bodies of autocast, gradient-mode and checkpoint regions in the place of the call::

        wrap_with_autocast(bfloat16, body: linear(x, w), x, w)     ->     linear(to(x, bfloat16), to(w, bfloat16))

    What autocast did silently is then written out: the operands of an operator that gives another dtype without it are
    cast to the dtype that it gave with it.

    Before: any graph. After: the same results; a region whose operators cannot be written out so stays as it is. Only for
    inference: checkpoints matter to gradients.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many regions were put in place."""
        count = 0
        for node in program.calls(*ONCE) if program.inference else ():
            count += _inline(program, node, program.module)
        program.drop_dead()
        return count


def body_and_operands(node: fx.Node, owner: torch.nn.Module) -> tuple[fx.GraphModule, list[Any]] | None:
    """The body that a call of a higher-order operator runs and what it hands to it, or None where it has not one."""
    at = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"]
    bodies = [getattr(owner, str(node.args[i].target), None) for i in at]  # type: ignore[union-attr]
    held = [(i, b) for i, b in zip(at, bodies, strict=True) if isinstance(b, fx.GraphModule)]
    if len(held) != 1:
        return None
    position, body = held[0]
    return body, list(node.args[position + 1 :])


class _CannotInlineError(Exception):
    """An operator of the body gives another dtype by itself, whatever its operands are cast to."""


def _inline(program: Program, node: fx.Node, owner: torch.nn.Module) -> bool:
    found = body_and_operands(node, owner)
    if found is None or any(u.target is not operator.getitem for u in node.users):
        return False
    before = set(program.graph.nodes)
    try:
        with program.graph.inserting_before(node):
            results = _copy_body(program, found[0], found[1], node)
    except _CannotInlineError:
        for new in reversed([n for n in program.graph.nodes if n not in before]):
            program.graph.erase_node(new)
        return False
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        program.graph.erase_node(user)
    program.graph.erase_node(node)
    return True


def _copy_body(program: Program, body: fx.GraphModule, operands: Sequence[Any], origin: fx.Node) -> Any:
    """Write the operators of ``body`` at the insertion point; returns what its output stands for."""
    environment: dict[fx.Node, Any] = {}
    given = iter(operands)
    for inner in body.graph.nodes:
        args, kwargs = fx.map_arg((inner.args, inner.kwargs), lambda n: environment[n])
        if inner.op == "placeholder":
            environment[inner] = next(given)
        elif inner.op == "output":
            results = args[0]
        elif inner.op == "get_attr":
            environment[inner] = inner
        elif inner.target in ONCE:
            found = body_and_operands(inner, body)
            if found is None:
                raise _CannotInlineError
            handed = [environment[o] if isinstance(o, fx.Node) else o for o in found[1]]
            environment[inner] = _copy_body(program, found[0], handed, origin)
        elif inner.target is operator.getitem and not isinstance(args[0], fx.Node):
            environment[inner] = args[0][args[1]]
        elif inner.op != "call_function" or any(isinstance(a, fx.Node) and a.op == "get_attr" for a in inner.args):
            raise _CannotInlineError
        elif inner.target is not aten._assert_tensor_metadata.default:
            environment[inner] = _write(program, inner, args, kwargs)
            inherit(environment[inner], inner)
            inherit(environment[inner], origin)
    return results


def _write(program: Program, inner: fx.Node, args: Any, kwargs: Any) -> fx.Node:
    """A call of ``inner``'s operator that gives the dtypes that ``inner`` gave."""
    want = list(_dtypes(inner.meta.get("val")))
    for cast_to in (None, *dict.fromkeys(d for d in want if d.is_floating_point)):
        given, named = fx.map_arg((args, kwargs), partial(_cast, program, cast_to))
        node = program.graph.call_function(inner.target, given, named)  # type: ignore[arg-type]
        try:
            node.meta["val"] = program.evaluate(node)
        except RuntimeError:
            node.meta["val"] = None
        if list(_dtypes(node.meta["val"])) == want:
            return node
        program.graph.erase_node(node)
    raise _CannotInlineError


def _cast(program: Program, dtype: torch.dtype | None, node: fx.Node) -> fx.Node:
    value = node.meta.get("val")
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return node
    return program.call(aten.to.dtype, node, dtype)


def _dtypes(value: Any) -> Iterator[torch.dtype]:
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf.dtype
