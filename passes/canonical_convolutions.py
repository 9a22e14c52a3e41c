"""Convolutions of 1 to 3 dimensions, plain and transposed, as ``aten.convolution`` on a matrix of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.kernels.ops.conv import matrix_shape, rows_of
from qcompile.passes.program import Program, normalized, static_shape, value
from qcompile.passes.sites import Sites
from qcompile.passes.views import trace

aten = torch.ops.aten


def convolution(sites: Sites, node: fx.Node) -> None:
    """A convolution with a constant weight, in any of its operators."""
    args = normalized(node)
    source = trace(sites.program, args["weight"])
    if source is None:
        sites.leave_operands("conv", node, args["weight"])
        return
    shape = static_shape(args["weight"])
    if shape is None:
        raise ValueError(f"{node.name}: a constant of unknown shape")
    rank = len(shape) - 2
    transposed = bool(args.get("transposed", "transpose" in str(node.target)))
    stride, dilation, padding = (_spread(args[k], rank) for k in ("stride", "dilation", "padding"))
    output_padding, groups = _spread(args.get("output_padding", 0), rank), args["groups"]
    weight = sites.weight(source, lambda w: rows_of(w, transposed, groups), ("rows", transposed, groups))
    program = sites.program
    with program.graph.inserting_before(node):
        x, operand = sites.cast(args["input"], node), sites.cast(weight, node)
        bias = None if args["bias"] is None else sites.cast(args["bias"], node)
        batched = value(x).dim() == rank + 2
        x = x if batched else program.call(aten.unsqueeze.default, x, 0, like=node)
        if isinstance(padding, str):
            x, padding = _pad(program, node, x, padding, shape[2:], dilation)
        rows, _ = matrix_shape(shape, transposed, groups)
        if transposed:
            sizes = [groups, rows // groups, shape[0] // groups, *shape[2:]]
            kernel = program.call(aten.reshape.default, operand, sizes, like=node)
            kernel = program.call(aten.transpose.int, kernel, 1, 2, like=node)
            kernel = program.call(aten.reshape.default, kernel, list(shape), like=node)
        else:
            kernel = program.call(aten.reshape.default, operand, list(shape), like=node)
        new = result = program.call(
            aten.convolution.default,
            x,
            kernel,
            bias,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            groups,
            like=node,
        )
        result = result if batched else program.call(aten.squeeze.dim, result, 0, like=node)
    sites.site("conv", new, weight, kernel)
    sites.replace(node, result)


def _spread(sizes: Any, rank: int) -> Any:
    """A convolution option as a list with one entry an axis (one number stands for all); padding words stay words."""
    if isinstance(sizes, str):
        return sizes
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes]
    return sizes * rank if len(sizes) == 1 else sizes


def _pad(
    program: Program, node: fx.Node, x: fx.Node, word: str, kernel: tuple[int, ...], dilation: list[int]
) -> tuple[fx.Node, list[int]]:
    """``padding="same"`` or ``"valid"`` in numbers; what cannot be split evenly is padded beforehand, at the end."""
    if word == "valid":
        return x, [0] * len(kernel)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        extra = [n for t in reversed(total) for n in (0, t % 2)]
        x = program.call(aten.constant_pad_nd.default, x, extra, like=node)
    return x, [t // 2 for t in total]
