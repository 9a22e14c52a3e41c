"""Kernels return images with their channels together: what reads them is told, what the user sees stays as it was."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.passes.base import Pass
from qcompile.passes.program import Program, is_tensor
from qcompile.passes.shapes import same_shape

aten = torch.ops.aten
qc = torch.ops.qcompile

#: Operators that return strides of their own choice.
CHANNELS_LAST = (qc.conv_tiled.default, qc.conv_depthwise.default)

#: Views that only some strides allow, each with the operator that takes any.
_VIEWS = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}

#: Operators that read memory as it lies.
_RAW = (aten.as_strided.default, aten.as_strided_.default, aten.set_.source_Tensor)


@dataclass(frozen=True)
class Restride(Pass):
    """Carry the strides of packed convolutions' results through the graph::

        conv_tiled(x) ─► view(…) ─► result     ->     conv_tiled(x) ─► reshape(…) ─► clone in the strides it had ─► result

    Views that the new strides do not allow become reshapes; the program's results, and what operators of other libraries
    read, are copied into the strides that they had.

    Before: packed. After: the fake value of each node has the strides that the program computes.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many nodes were changed or added."""
        before: dict[fx.Node, Tensor] = {}  # values whose strides changed, as they were
        count = 0
        for node in list(program.graph.nodes):
            if node.op == "output":
                count += _restore(program, node, before)
            if node.op != "call_function":
                continue
            if node.target in CHANNELS_LAST:
                _note(before, node, node.meta.get("logical"), node.meta["val"])
                continue
            if not any(source in before for source in node.all_input_nodes) or not is_tensor_node(node):
                continue
            if node.target in _RAW or not _ours(node.target):
                count += _restore(program, node, before)
                continue
            old = node.meta["val"]
            if node.target in _VIEWS and not _allowed(program, node):
                node.target = _VIEWS[node.target]
                count += 1
            node.meta["val"] = program.evaluate(node)
            _note(before, node, old, node.meta["val"])
        return count


def is_tensor_node(node: fx.Node) -> bool:
    """Whether a call gives tensors whose strides follow from its inputs, and no sizes that depend on their values."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.dynamic_output_shape not in tags and torch.Tag.data_dependent_output not in tags


def _ours(target: object) -> bool:
    return getattr(target, "namespace", None) in ("aten", "prims", "qcompile") or target is operator.getitem


def _note(before: dict[fx.Node, Tensor], node: fx.Node, old: Any, new: Any) -> None:
    """Remember a value whose strides are not what they were (of several, all of them)."""
    olds, news = (list(v) if isinstance(v, (list, tuple)) else [v] for v in (old, new))
    for a, b in zip(olds, news, strict=False):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and not same_shape(a.stride(), b.stride()):
            before[node] = a
            return


def _allowed(program: Program, node: fx.Node) -> bool:
    try:
        program.evaluate(node)
    except (RuntimeError, ValueError):
        return False
    return True


def _restore(program: Program, node: fx.Node, before: dict[fx.Node, Tensor]) -> int:
    """Let ``node`` read copies, in the strides that they had, of those of its inputs that have others now."""
    copies: dict[fx.Node, fx.Node] = {}
    for source in node.all_input_nodes:
        if source not in before or not is_tensor(source):
            continue
        with program.graph.inserting_before(node):
            copies[source] = _copied(program, source, _order(before[source]))
    if copies:
        node.args = fx.map_arg(node.args, lambda n: copies.get(n, n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: copies.get(n, n))
    return len(copies)


def _copied(program: Program, source: fx.Node, order: list[int]) -> fx.Node:
    """A copy of ``source`` with its axes in this order in memory."""
    plain = list(range(len(order)))
    dense = source if order == plain else program.call(aten.permute.default, source, order, like=source)
    dense = program.call(aten.clone.default, dense, memory_format=torch.contiguous_format, like=source)
    if order == plain:
        return dense
    return program.call(aten.permute.default, dense, [order.index(i) for i in plain], like=source)


def _order(tensor: Tensor) -> list[int]:
    """The axes of a tensor, those with large strides first; symbolic sizes count by what they were at capture."""

    def known(n: Any) -> int:
        hint = n.node.hint if isinstance(n, torch.SymInt) else n
        return 0 if hint is None else int(hint)

    plain = list(range(tensor.dim()))
    if tensor.is_contiguous() or any(known(n) == 0 for n in tensor.stride()):
        return plain
    return sorted(plain, key=lambda i: (-known(tensor.stride(i)), -known(tensor.shape[i]), i))
