"""``qcompile::conv_tiled``: a 1- or 2-dimensional convolution on a packed weight, with its epilogue.

``y = act(conv(x, W) + bias)``, or ``after(act(…) + add)``. The result is *channels last*: the channels of a position lie
together, so that the next convolution reads what this one wrote; x may have any strides.

The reference decodes the weight and computes in float32; the CPU kernel quantizes x to int8 by blocks of 32 on the fly,
unless ``exact``: 32 channels of a pixel, or where it has too few, or scales are grouped otherwise, 32 values under the
kernel.

Where all activations have one scale that is known, ``x_scale`` (a float32 scalar) says that x is rounded as
``fake_quantize`` does it, or that it is int8, the codes themselves: then ``dtype`` is that of its values. With ``out_scale``
the result is codes: ``clamp(round(y / out_scale), -127, 127)``; -128 stands for NaN. Convolutions that follow one
another so hand on int8 and no floats.

``order`` says how the columns of the packed weight follow one another (:mod:`qcompile.kernels.layouts.conv`); ``padding`` is
that before each axis, then that after each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.layouts.conv import ORDERS, columns, packed_columns
from qcompile.kernels.layouts.tiled import TILE
from qcompile.kernels.ops._tiled import ACTIVATIONS, ceil_div, check_weight, define_differentiable, dequantize_rows
from qcompile.kernels.ops._window import check_call, empty_image, gradients, out_shape, preactivation, read, written

_OP = "qcompile::conv_tiled"
_SCHEMA = (
    "conv_tiled(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, str order, "
    "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, str activation=\"none\", "
    "Tensor? add=None, str after=\"none\", bool exact=False, Tensor? x_scale=None, Tensor? out_scale=None, "
    "ScalarType? dtype=None) -> Tensor"
)  # fmt: skip


def _check(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    order: str, weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
    activation: str, add: Tensor | None, after: str, exact: bool, x_scale: Tensor | None, out_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> None:  # fmt: skip
    check_call(
        _OP, x, bias, weight_shape, stride, padding, dilation, groups, activation, add, after, x_scale, out_scale, dtype
    )  # fmt: skip
    if exact and x_scale is not None:
        raise ValueError(f"{_OP}: give one of exact and x_scale, got both")
    if out_scale is not None and x_scale is None:
        raise ValueError(f"{_OP}: out_scale goes with x_scale, which is missing")
    if order not in ORDERS:
        raise ValueError(f"{_OP}: order must be one of {', '.join(ORDERS)}, got {order!r}")
    tiles = groups * ceil_div(weight_shape[0] // groups, TILE)
    check_weight(_OP, codes, scale, zero, bits, group_size, tiles, packed_columns(weight_shape, order))


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    order: str, weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
    activation: str = "none", add: Tensor | None = None, after: str = "none", exact: bool = False,
    x_scale: Tensor | None = None, out_scale: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    _check(
        x, codes, scale, zero, bias, bits, group_size, order, weight_shape, stride, padding, dilation, groups, activation,
        add, after, exact, x_scale, out_scale, dtype,
    )  # fmt: skip
    return empty_image(x, out_shape(x, weight_shape, stride, padding, dilation), out_scale, dtype)


def conv_tiled(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    order: str, weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
    activation: str = "none", add: Tensor | None = None, after: str = "none", exact: bool = False,
    x_scale: Tensor | None = None, out_scale: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The reference, in plain torch and float32 (see the module's docstring); raises ValueError on a mismatch."""
    _check(
        x, codes, scale, zero, bias, bits, group_size, order, weight_shape, stride, padding, dilation, groups, activation,
        add, after, exact, x_scale, out_scale, dtype,
    )  # fmt: skip
    weight = _weight(codes, scale, zero, bits, group_size, order, weight_shape, groups)
    y = ACTIVATIONS[activation](preactivation(read(_OP, x, x_scale), weight, bias, stride, padding, dilation, groups))
    return written(_OP, y if add is None else ACTIVATIONS[after](y + add), out_scale, dtype or x.dtype)


def _weight(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, order: str, weight_shape: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """The decoded weight, ``[out, in / groups, *kernel]`` in float32."""
    rows = dequantize_rows(codes, scale, zero, bits, group_size, packed_columns(weight_shape, order))
    rows = rows.unflatten(0, (groups, -1))[:, : weight_shape[0] // groups].flatten(0, 1)
    return rows[:, columns(weight_shape, order, group_size, rows.device)].reshape(weight_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, codes, scale, zero, bias, bits, group_size, order, weight_shape, *window, activation, add, after, _ = inputs[:-3]
    if any(given is not None for given in inputs[-3:]):
        raise ValueError(f"{_OP}: rounded activations have no gradient here; put fake_quantize before the convolution")
    ctx.save_for_backward(x, codes, scale, zero, bias)
    ctx.layout, ctx.window = (bits, group_size, order, list(weight_shape)), window
    ctx.activation, ctx.has_add = activation, add is not None
    if after != "none":
        raise RuntimeError(f"{_OP} has no gradient formula for what follows the sum: after={after!r}")


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, scale, zero, bias = ctx.saved_tensors
    bits, group_size, order, weight_shape = ctx.layout
    stride, padding, dilation, groups = ctx.window
    weight = _weight(codes, scale, zero, bits, group_size, order, weight_shape, groups)
    want_x, want_bias = ctx.needs_input_grad[0], bias is not None and ctx.needs_input_grad[4]
    grad_x, grad_bias = gradients(
        grad, x, weight, bias, stride, padding, dilation, groups, ctx.activation, want_x, want_bias
    )
    return grad_x, None, None, None, grad_bias, *([None] * 9), grad if ctx.has_add else None, *([None] * 5)


define_differentiable(_SCHEMA, conv_tiled, _fake, _setup_context, _backward)
