"""Following a value back to the constant of which it is a view.

A weight rarely reaches its matmul as it is stored: it is transposed, cut in three, taken out of a stack, cast. As long as
every step only rearranges or selects, the result is as constant as its source and can be quantized.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.passes.program import Program, inputs_of, is_tensor, shape_of
from qcompile.passes.shapes import same_shape

aten = torch.ops.aten

#: Rearrange or select; each result element is one source element.
VIEWS = frozenset({
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default,
    aten.select.int, aten.slice.Tensor, aten.narrow.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int, aten.numpy_T.default, aten.mT.default,
    aten.movedim.int, aten.swapaxes.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes,
    aten.chunk.default, aten.unbind.int, aten.tensor_split.sections, aten._unsafe_view.default, aten.view_as.default,
    aten.adjoint.default, aten.matrix_H.default,
})  # fmt: skip

#: Give the same numbers again (up to the rounding of a cast).
COPIES = frozenset({
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.detach_.default,
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.lift_fresh_copy.default,
})  # fmt: skip


#: A slice that ends beyond this ends at the end.
_END = 1 << 40

_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default})


@dataclass(frozen=True)
class Source:
    """A constant and the steps from it to some value.

    Attributes:
        node: the constant's placeholder.
        steps: the view operators in order, as nodes.
    """

    node: fx.Node
    steps: tuple[fx.Node, ...]

    @property
    def path(self) -> tuple[str, ...]:
        """The steps as text: equal for two values only if they are the same view."""
        return tuple(f"{s.target}{s.args[1:]}{s.kwargs}" for s in self.steps)

    @property
    def label(self) -> str:
        """The part that the steps select, as Python writes it behind the name: ``[2]``, ``[:, 0:64]``, or nothing."""
        text = ""
        for step in self.steps:
            if step.target is operator.getitem:
                text += f"[part {step.args[1]}]"
            elif step.target is aten.select.int:
                text += _subscript(step, str(step.args[2]))
            elif step.target is aten.slice.Tensor:
                slice_args: tuple[Any, ...] = (*step.args, *(None, 0, None, None, 1)[len(step.args) :])
                _, _, start, end, stride = slice_args
                end = "" if end is None or end > _END else end
                text += _subscript(step, f"{start or 0}:{end}" + (f":{stride}" if stride != 1 else ""))
            elif step.target is aten.narrow.default:
                text += _subscript(step, f"{step.args[2]}:{step.args[2] + step.args[3]}")  # type: ignore[operator]
        return text

    def evaluate(self, tensor: Tensor) -> Tensor:
        """The same view of ``tensor``."""
        current: object = tensor
        for step in self.steps:
            # Copies were skipped, so a view may not fit the strides any more: reshape copies where it must.
            target = aten.reshape.default if step.target in _RESHAPES else step.target
            current = target(current, *step.args[1:], **step.kwargs)  # type: ignore[operator]
        if not isinstance(current, Tensor):
            raise TypeError(f"the steps from {self.node.name} do not end in a tensor")
        return current


def _subscript(step: fx.Node, part: str) -> str:
    axis = step.args[1] if len(step.args) > 1 else 0
    return f"[{':, ' * axis}{part}]" if isinstance(axis, int) and axis >= 0 else f"[..., {part}]"


def trace(program: Program, node: object) -> Source | None:
    """The constant that ``node`` is a view of, or None if it is not one."""
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node):
        if program.constant(node) is not None:
            return Source(node, tuple(reversed(steps)))
        if node.op != "call_function" or not node.args:
            return None
        static = node.all_input_nodes == [node.args[0]]
        if node.target in COPIES and is_tensor(node):
            pass
        elif (node.target in VIEWS or node.target is operator.getitem) and static:
            steps.append(node)
        else:
            return None
        node = node.args[0]
    return None


@dataclass(frozen=True)
class Repeated:
    """A constant matrix, or stack of matrices, that is repeated along a leading axis.

    Attributes:
        node: the value before it is repeated, ``[K, N]`` or ``[E, K, N]``.
        times: how often a stack is repeated (a number or the node of one); None where a matrix is repeated, or nothing is.
    """

    node: fx.Node
    times: object = None


def repeated(program: Program, node: object) -> Repeated | None:
    """What ``view(expand(constant))``, of shape ``[B, K, N]``, repeats; None if ``node`` is something else."""
    if not is_tensor(node):
        return None
    matrix = shape_of(node)[-2:]  # type: ignore[arg-type]
    while isinstance(node, fx.Node) and node.target in (*_RESHAPES, aten.reshape.default, aten.clone.default):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.expand.default:
        return None
    held, shape = node.args[0], shape_of(node)
    if trace(program, held) is None or not isinstance(held, fx.Node) or not same_shape(shape[-2:], matrix):
        return None
    own = shape_of(held)
    if len(own) == 2 and same_shape(own, matrix):
        return Repeated(held)
    if len(own) == 3 and same_shape(own, shape):
        return Repeated(held)
    if len(own) == 3 and len(shape) == 4 and same_shape(own, shape[1:]):
        return Repeated(held, node.args[1][0])  # type: ignore[index]
    return None


def made_from(program: Program, node: fx.Node) -> tuple[str, ...] | None:
    """Names of the constants from which ``node`` is computed if nothing else goes into it, else None."""
    names: list[str] = []
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        constant = program.constant(current)
        if constant is not None:
            names.append(constant.name)
        elif current.op == "placeholder":
            return None
        else:
            stack.extend(inputs_of(current))
    return tuple(sorted(names)) or None
