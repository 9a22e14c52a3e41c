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
from qcompile.kernels.ops._tiled import ACTIVATIONS
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
    output_padding: list[int], groups: int, activation: str = "none", add: Tensor | None = None,
    after: str = "none", pad: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """``act(convolution(x, W) + bias)``, or ``after(… + add)``, with the weight of the codes.

    Arguments and result are those of ``aten.convolution``, and further:

    Args:
        activation: one of :data:`~qcompile.kernels.ops._tiled.ACTIVATIONS`.
        add: of the result's shape.
        after: what the sum with ``add`` goes through.
        pad: zeros that are put around x first, as ``aten.constant_pad_nd`` takes them.
    """
    _check_epilogue(x, activation, add, after)
    matrix = list(matrix_shape(weight_shape, transposed, groups))
    weight = weight_of(dequantize(data, scale, zero, scheme, matrix, x.dtype), weight_shape, transposed, groups)
    x = _padded(x, pad)
    y = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    y = y if activation == "none" else ACTIVATIONS[activation](y)
    return y if add is None else ACTIVATIONS[after](y + add)


def _padded(x: Tensor, pad: Sequence[int]) -> Tensor:
    return torch.ops.aten.constant_pad_nd(x, list(pad)) if any(pad) else x


def _check_epilogue(x: Tensor, activation: str, add: Tensor | None, after: str) -> None:
    for name in (activation, after):
        if name not in ACTIVATIONS:
            raise ValueError(f"unknown activation {name!r}; allowed: {', '.join(ACTIVATIONS)}")
    if add is not None and add.dtype != x.dtype:
        raise ValueError(f"add must have the dtype of x, {x.dtype}, got {add.dtype}")


def _conv_fake(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str,
    weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], transposed: bool,
    output_padding: list[int], groups: int, activation: str = "none", add: Tensor | None = None,
    after: str = "none", pad: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    matrix = matrix_shape(weight_shape, transposed, groups)
    check_parts(data, scale, zero, Scheme.parse(scheme), matrix)
    _check_epilogue(x, activation, add, after)
    weight, x = x.new_empty(weight_shape), _padded(x, pad)
    y = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    return y if add is None else torch.empty_like(y + add)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, scale, zero, bias, *ctx.rest, activation, add, _, pad = inputs
    if activation != "none" or add is not None or any(pad):
        raise RuntimeError("qcompile::conv has no gradient formula for its epilogue")
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
    return (grad_x, None, None, None, grad_bias, *([None] * 12))


define(
    "conv(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, str scheme, int[] weight_shape, "
    "int[] stride, SymInt[] padding, int[] dilation, bool transposed, SymInt[] output_padding, int groups, "
    'str activation="none", Tensor? add=None, str after="none", int[] pad=[]) -> Tensor',
    conv,
    _conv_fake,
    setup_context=_conv_setup,
    backward=_conv_backward,
)
