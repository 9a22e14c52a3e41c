"""``qcompile::conv_depthwise``: a convolution in which every channel has a kernel of its own, with its epilogue.

``y = act(conv(x, W) + bias)``, or ``after(act(…) + add)``, with arguments and result as in :mod:`.conv_tiled`. The weight
lies in codes of one byte (:mod:`qcompile.kernels.layouts.depthwise`). There is too little to compute to pay for rounding
activations, which stay floats but where ``x_scale`` says that they are rounded, or are codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.layouts.depthwise import untile
from qcompile.kernels.layouts.tiled import TILE
from qcompile.kernels.ops._tiled import ACTIVATIONS, FLOATS, ceil_div, define_differentiable
from qcompile.kernels.ops._window import check_call, empty_image, gradients, out_shape, preactivation, read, written

_OP = "qcompile::conv_depthwise"
_SCHEMA = (
    "conv_depthwise(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    "int[] weight_shape, int[] stride, int[] padding, int[] dilation, str activation=\"none\", Tensor? add=None, "
    "str after=\"none\", Tensor? x_scale=None, Tensor? out_scale=None, ScalarType? dtype=None) -> Tensor"
)  # fmt: skip


def _check(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], activation: str, add: Tensor | None,
    after: str, x_scale: Tensor | None, out_scale: Tensor | None, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    check_call(
        _OP, x, bias, weight_shape, stride, padding, dilation, weight_shape[0], activation, add, after, x_scale, out_scale,
        dtype,
    )  # fmt: skip
    taps = 1
    for size in weight_shape[2:]:
        taps *= size
    if not 2 <= bits <= 8 or group_size < 0:
        raise ValueError(f"{_OP}: bits must be 2 to 8 and group_size not negative, got {bits} and {group_size}")
    tiles = ceil_div(weight_shape[0], TILE)
    groups = ceil_div(taps, group_size) if 0 < group_size < taps else 1
    for name, tensor, dtypes, shape in (
        ("codes", codes, (torch.uint8,), [tiles, taps, TILE]),
        ("scale", scale, FLOATS, [tiles, groups, TILE]),
        ("zero", zero, (torch.uint8, scale.dtype), [tiles, groups, TILE]),
    ):
        if tensor is None:
            continue
        if list(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            allowed = " or ".join(str(d) for d in dtypes)
            raise ValueError(
                f"{_OP}: {name} must be contiguous {allowed} {shape} for a weight {weight_shape}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], activation: str = "none",
    add: Tensor | None = None, after: str = "none", x_scale: Tensor | None = None, out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    _check(
        x, codes, scale, zero, bias, bits, group_size, weight_shape, stride, padding, dilation, activation, add, after,
        x_scale, out_scale, dtype,
    )  # fmt: skip
    return empty_image(x, out_shape(x, weight_shape, stride, padding, dilation), out_scale, dtype)


def conv_depthwise(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int], activation: str = "none",
    add: Tensor | None = None, after: str = "none", x_scale: Tensor | None = None, out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The reference, in plain torch and float32 (see the module's docstring); raises ValueError on a mismatch."""
    _check(
        x, codes, scale, zero, bias, bits, group_size, weight_shape, stride, padding, dilation, activation, add, after,
        x_scale, out_scale, dtype,
    )  # fmt: skip
    weight = _weight(codes, scale, zero, bits, group_size, weight_shape)
    values = read(_OP, x, x_scale)
    y = ACTIVATIONS[activation](preactivation(values, weight, bias, stride, padding, dilation, weight_shape[0]))
    return written(_OP, y if add is None else ACTIVATIONS[after](y + add), out_scale, dtype or x.dtype)


def _weight(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, weight_shape: list[int]
) -> Tensor:
    """The decoded weight, ``[channels, 1, *kernel]`` in float32."""
    channels, taps = weight_shape[0], codes.shape[1]
    group = torch.arange(taps, device=codes.device) // (group_size if 0 < group_size < taps else max(taps, 1))
    u, s = untile(codes, channels).float(), untile(scale, channels).float()[:, group]
    if zero is None:
        return ((u - 2 ** (bits - 1)) * s).reshape(weight_shape)
    z = untile(zero, channels).float()[:, group]
    return ((u - z) * s if zero.dtype == torch.uint8 else u * s + z).reshape(weight_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, codes, scale, zero, bias, bits, group_size, weight_shape, *window, activation, add, after = inputs[:-3]
    if any(given is not None for given in inputs[-3:]):
        raise ValueError(f"{_OP}: rounded activations have no gradient here; put fake_quantize before the convolution")
    ctx.save_for_backward(x, codes, scale, zero, bias)
    ctx.layout, ctx.window = (bits, group_size, list(weight_shape)), window
    ctx.activation, ctx.has_add = activation, add is not None
    if after != "none":
        raise RuntimeError(f"{_OP} has no gradient formula for what follows the sum: after={after!r}")


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, scale, zero, bias = ctx.saved_tensors
    stride, padding, dilation = ctx.window
    weight = _weight(codes, scale, zero, *ctx.layout)
    want_x, want_bias = ctx.needs_input_grad[0], bias is not None and ctx.needs_input_grad[4]
    grad_x, grad_bias = gradients(
        grad, x, weight, bias, stride, padding, dilation, weight.shape[0], ctx.activation, want_x, want_bias
    )
    return grad_x, None, None, None, grad_bias, *([None] * 7), grad if ctx.has_add else None, *([None] * 4)


define_differentiable(_SCHEMA, conv_depthwise, _fake, _setup_context, _backward)
