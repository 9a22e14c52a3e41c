"""Any product of an activation with a constant, written with index labels, as one linear or one batched linear.

``einsum`` says it with labels already; ``matmul``, ``mm`` and ``bmm`` are special cases.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.passes.program import Program, shape_of, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """Labels of activation, weight and result, one character an axis.

    Attributes:
        x, weight, out: the labels.

    Example:
        >>> Contraction("bsd", "dk", "bsk").kind
        'linear'
    """

    x: str
    weight: str
    out: str

    @property
    def batch(self) -> str:
        """Labels in all three: each of their values has a weight of its own."""
        return "".join(c for c in self.weight if c in self.x and c in self.out)

    @property
    def reduced(self) -> str:
        """Labels summed over."""
        return "".join(c for c in self.weight if c in self.x and c not in self.out)

    @property
    def columns(self) -> str:
        """Labels of the weight alone: the output features."""
        return "".join(c for c in self.weight if c not in self.x and c in self.out)

    @property
    def rows(self) -> str:
        """Labels of the activation alone."""
        return "".join(c for c in self.x if c not in self.weight and c in self.out)

    @property
    def kind(self) -> str | None:
        """``linear``, ``grouped_linear``, or None where the product is neither (a diagonal, an outer product, a sum)."""
        for labels in (self.x, self.weight, self.out):
            if len(set(labels)) != len(labels):
                return None
        known = set(self.batch + self.reduced + self.columns + self.rows)
        if known != set(self.x) | set(self.weight) or set(self.out) > known or not self.reduced or not self.columns:
            return None
        return "grouped_linear" if self.batch else "linear"

    def arrange(self, weight: Tensor) -> Tensor:
        """The weight as ``[N, K]`` (linear) or ``[E, N, K]`` (grouped); a view where its strides allow one."""
        order = [self.weight.index(c) for c in self.batch + self.columns + self.reduced]
        sizes = [_product(weight.shape[self.weight.index(c)] for c in part) for part in (self.columns, self.reduced)]
        if self.batch:
            sizes.insert(0, _product(weight.shape[self.weight.index(c)] for c in self.batch))
        return weight.permute(order).reshape(sizes)

    def emit(self, program: Program, node: fx.Node, x: fx.Node, weight: fx.Node, weight_sizes: Sequence[int]) -> fx.Node:
        """Add the calls that compute ``node`` from ``x`` and the arranged weight; returns the result."""
        sizes = dict(zip(self.weight, weight_sizes, strict=True))
        current = _permute(program, node, x, [self.x.index(c) for c in self.batch + self.rows + self.reduced])
        current = _flatten(program, node, current, len(self.batch + self.rows), len(self.reduced))
        if not self.batch:
            current = program.call(aten.linear.default, current, weight, like=node)
        else:
            row_sizes = [_size(program, x, self.x.index(c), node) for c in self.rows]
            current = _flatten(program, node, current, len(self.batch), len(self.rows))
            current = _flatten(program, node, current, 0, len(self.batch))
            transposed = program.call(aten.transpose.int, weight, 1, 2, like=node)
            current = program.call(aten.bmm.default, current, transposed, like=node)
            current = _unflatten(program, node, current, 1, row_sizes)
            current = _unflatten(program, node, current, 0, [sizes[c] for c in self.batch])
        axis = len(self.batch + self.rows)
        current = _unflatten(program, node, current, axis, [sizes[c] for c in self.columns])
        have = self.batch + self.rows + self.columns
        return _permute(program, node, current, [have.index(c) for c in self.out])


def parse_einsum(equation: str, ranks: Sequence[int]) -> tuple[str, str, str] | None:
    """Labels of both operands and the result of a two-operand einsum, ellipsis spelled out; None for other forms."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if len(operands) != 2 or len(ranks) != 2:
        return None
    spare = [c for c in string.ascii_uppercase + string.ascii_lowercase if c not in equation]
    depth = max(rank - len(o.replace("...", "")) for o, rank in zip(operands, ranks, strict=True))
    dots = "".join(spare[: max(0, depth)])
    spelled = []
    for labels, rank in zip(operands, ranks, strict=True):
        missing = rank - len(labels.replace("...", ""))
        if missing < 0 or (missing and "..." not in labels):
            return None
        spelled.append(labels.replace("...", dots[len(dots) - missing :]))
    if not arrow:
        counts = left.replace("...", "").replace(",", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(counts) if counts.count(c) == 1))
    return spelled[0], spelled[1], right.replace("...", dots)


def _product(sizes: object) -> int:
    total = 1
    for size in sizes:  # type: ignore[attr-defined]
        total *= size
    return total


def _size(program: Program, x: fx.Node, axis: int, like: fx.Node) -> object:
    size = shape_of(x)[axis]
    return size if isinstance(size, int) else program.call(aten.sym_size.int, x, axis, like=like)


def _permute(program: Program, like: fx.Node, x: fx.Node, order: list[int]) -> fx.Node:
    return x if order == sorted(order) else program.call(aten.permute.default, x, order, like=like)


def _flatten(program: Program, like: fx.Node, x: fx.Node, axis: int, count: int) -> fx.Node:
    """Merge ``count`` axes from ``axis`` on into one; none become one of size 1."""
    if count == 1:
        return x
    if count == 0:
        return program.call(aten.unsqueeze.default, x, axis, like=like)
    return program.call(aten.flatten.using_ints, x, axis, axis + count - 1, like=like)


def _unflatten(program: Program, like: fx.Node, x: fx.Node, axis: int, sizes: Sequence[object]) -> fx.Node:
    if len(sizes) == 1:
        return x
    if not sizes:
        return program.call(aten.squeeze.dim, x, axis, like=like)
    if value(x).dim() == 0:
        raise ValueError("a scalar has no axis to unflatten")
    return program.call(aten.unflatten.int, x, axis, list(sizes), like=like)
