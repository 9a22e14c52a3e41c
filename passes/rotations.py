"""Rotary position embedding, as models write it out, found among the steps of a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import fx

from qcompile.passes.program import is_tensor, normalized, value
from qcompile.passes.sequence_steps import Place

aten = torch.ops.aten


def rotations(
    nodes: Iterable[fx.Node], places: Mapping[fx.Node, Place]
) -> tuple[dict[fx.Node, list[fx.Node]], set[fx.Node]]:
    """Which of ``nodes`` are sums that turn pairs of values, and which of them only such a sum reads.

    ::

        x * cos + cat([-x[..., half:], x[..., :half]]) * sin

    Returns:
        By the sum: x, cos and sin. And what becomes a part of it.
    """
    inside = set(nodes)
    found: dict[fx.Node, list[fx.Node]] = {}
    parts: set[fx.Node] = set()
    for node in inside:
        for x, cos, sin, within in _read(node, places):
            if all(n in inside and len(n.users) == 1 for n in within):
                found[node] = [x, cos, sin]
                parts.update(within)
                break
    return found, parts


def _read(node: fx.Node, places: Mapping[fx.Node, Place]) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, list[fx.Node]]]:
    """x, cos, sin and the nodes in between, for each way in which a sum may be read so."""
    for plain, turned in _operands(node, aten.add.Tensor):
        factors = _operands(plain, aten.mul.Tensor), _operands(turned, aten.mul.Tensor)
        for (x, cos), (half, sin) in itertools.product(*factors):
            minus = _turned(half, x, places)
            if minus is not None and value(x).shape == value(node).shape:
                yield x, cos, sin, [plain, turned, half, minus]


def _operands(node: fx.Node, target: object) -> list[tuple[fx.Node, fx.Node]]:
    """The two tensors that a call reads, in both orders."""
    if node.target is not target:
        return []
    args = normalized(node)
    a, b = args["self"], args["other"]
    if args.get("alpha", 1) != 1 or not (is_tensor(a) and is_tensor(b)):
        return []
    return [(a, b), (b, a)]


def _turned(node: fx.Node, x: fx.Node, places: Mapping[fx.Node, Place]) -> fx.Node | None:
    """The negation in ``cat([-x[..., half:], x[..., :half]])``; None where the node is anything else."""
    if node.target is not aten.cat.default or x not in places:
        return None
    args = normalized(node)
    if len(args["tensors"]) != 2 or args["dim"] not in (-1, value(node).dim() - 1):
        return None
    minus, low = args["tensors"]
    if minus.target is not aten.neg.default or low not in places or minus.args[0] not in places:
        return None
    whole, half = places[x], value(x).shape[-1] // 2
    sizes = (*whole.kind.sizes[:-1], half)
    for part, begin in ((low, 0), (minus.args[0], half)):
        own = places[part]
        if own.root is not whole.root or own.kind.sizes != sizes or own.kind.strides != whole.kind.strides:
            return None
        if own.offset != whole.offset + begin * whole.kind.strides[-1]:
            return None
    return minus if value(x).shape[-1] == 2 * half else None
