"""``qcompile::conv``: 1-, 2- and 3-d convolution, plain or transposed, with the weight in codes.

The weight is held as a matrix with one row for each output channel, so that channel and group granularity mean the same
as in a linear layer: ``[O, I/groups * prod(kernel)]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define
from qcompile.kernels.ops.dequantize import dequantize
from qcompile.kernels.qtensor import check_parts
from qcompile.kernels.scheme import Scheme


def rows_of(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """A convolution weight as a matrix with a row for each output channel.

    Args:
        weight: ``[O, I/groups, *kernel]``, or transposed ``[I, O/groups, *kernel]``.
    """
    if transposed:
        split = weight.unflatten(0, (groups, weight.shape[0] // groups))
        weight = split.transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def weight_of(rows: Tensor, shape: Sequence[int], transposed: bool, groups: int) -> Tensor:
    """The inverse of :func:`rows_of`; ``shape`` is the weight's own."""
    if not transposed:
        return rows.reshape(list(shape))
    per_group, kernel = shape[0] // groups, list(shape[2:])
    return rows.reshape([groups, shape[1], per_group, *kernel]).transpose(1, 2).reshape(list(shape))


def matrix_shape(shape: Sequence[int], transposed: bool, groups: int) -> tuple[int, int]:
    """Rows and columns of :func:`rows_of` for a weight of ``shape``."""
    total = 1
    for size in shape:
        total *= size
    rows = shape[1] * groups if transposed else shape[0]
    return rows, total // rows if rows else 0


def conv(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str,
    weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """``aten.convolution`` of ``x`` with the weight that the codes stand for; same arguments, same result shape."""
    matrix = list(matrix_shape(weight_shape, transposed, groups))
    weight = weight_of(dequantize(data, scale, zero, scheme, matrix, x.dtype), weight_shape, transposed, groups)
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _conv_fake(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str,
    weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int,
) -> Tensor:  # fmt: skip
    matrix = matrix_shape(weight_shape, transposed, groups)
    check_parts(data, scale, zero, Scheme.parse(scheme), matrix)
    weight = x.new_empty(weight_shape)
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, scale, zero, bias, *ctx.rest = inputs
    ctx.save_for_backward(x, data, scale, zero)
    ctx.bias_sizes = None if bias is None else list(bias.shape)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, data, scale, zero = ctx.saved_tensors
    scheme, weight_shape, stride, padding, dilation, transposed, output_padding, groups = ctx.rest
    matrix = list(matrix_shape(weight_shape, transposed, groups))
    rows = torch.ops.qcompile.dequantize(data, scale, zero, scheme, matrix, x.dtype)
    weight = weight_of(rows, weight_shape, transposed, groups)
    mask = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[4]]
    grad_x, _, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask
    )
    return (grad_x, None, None, None, grad_bias, *([None] * 8))


define(
    "conv(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, str scheme, int[] weight_shape, "
    "int[] stride, SymInt[] padding, int[] dilation, bool transposed, SymInt[] output_padding, int groups) -> Tensor",
    conv,
    _conv_fake,
    setup_context=_conv_setup,
    backward=_conv_backward,
)
