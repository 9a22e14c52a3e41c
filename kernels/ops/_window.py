"""What the packed convolution operators share: how a kernel moves over an image, and its plain-torch arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.kernels.ops._tiled import ACTIVATIONS, FLOATS, activation_backward, check_bias, check_input

aten = torch.ops.aten


def check_call(
    op: str, x: Tensor, bias: Tensor | None, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, activation: str, add: Tensor | None, after: str, x_scale: Tensor | None,
    out_scale: Tensor | None, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """Raise ValueError unless everything but the weight's own tensors fits (see :mod:`.conv_tiled`)."""
    values = check_codes(op, x, x_scale, out_scale, dtype)
    axes = len(weight_shape) - 2
    if axes not in (1, 2):
        raise ValueError(f"{op}: weight_shape must be [out, in / groups, *kernel], 1-d or 2-d, got {list(weight_shape)}")
    if x.dim() != axes + 2:
        raise ValueError(f"{op}: x must have {axes + 2} dimensions for a weight {list(weight_shape)}, got {list(x.shape)}")
    if groups < 1 or weight_shape[0] < 1 or weight_shape[0] % groups or x.shape[1] != weight_shape[1] * groups:
        raise ValueError(f"{op}: x {list(x.shape)} does not fit a weight {list(weight_shape)} in {groups} groups")
    if len(stride) != axes or len(dilation) != axes or len(padding) != 2 * axes:
        raise ValueError(f"{op}: stride and dilation must have {axes} entries and padding {2 * axes}")
    if min(*stride, *dilation, *weight_shape[2:]) < 1:
        sizes = f"{list(weight_shape)}, {list(stride)}, {list(dilation)}"
        raise ValueError(f"{op}: kernel sizes, stride and dilation must be positive, got {sizes}")
    if any(p < 0 for p in padding):
        raise ValueError(f"{op}: padding must not be negative, got {list(padding)}")
    for name, value in (("activation", activation), ("after", after)):
        if value not in ACTIVATIONS:
            raise ValueError(f"{op}: {name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")
    if add is None and after != "none":
        raise ValueError(f"{op}: after={after!r} is what the sum with add goes through, and there is no add")
    check_bias(op, bias, x.new_empty(0, dtype=values), weight_shape[0])
    shape = out_shape(x, weight_shape, stride, padding, dilation)
    if any(n < 1 for n in shape[2:]):
        raise ValueError(f"{op}: the kernel {list(weight_shape[2:])} is larger than the padded x {list(x.shape)}")
    if add is not None:
        if add.dim() != len(shape) or any(a != b for a, b in zip(add.shape, shape, strict=True)):
            raise ValueError(f"{op}: add must have the result's shape {shape}, got {list(add.shape)}")
        if add.dtype != values:
            raise ValueError(f"{op}: add must be {values} like x, got {add.dtype}")


def check_codes(
    op: str, x: Tensor, x_scale: Tensor | None, out_scale: Tensor | None, dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of the values of x and the result; raise ValueError unless x, the scales and ``dtype`` fit together."""
    for name, scale in (("x_scale", x_scale), ("out_scale", out_scale)):
        if scale is not None and (scale.dtype != torch.float32 or scale.dim() != 0):
            raise ValueError(f"{op}: {name} must be a float32 scalar, got {scale.dtype} {list(scale.shape)}")
    if x.dtype != torch.int8:
        check_input(op, x)
        if dtype not in (None, x.dtype):
            raise ValueError(f"{op}: dtype must be that of x, {x.dtype}, or None, got {dtype}")
        return x.dtype
    if x_scale is None or dtype not in FLOATS:
        raise ValueError(f"{op}: for codes, an int8 x, give x_scale and the float dtype of its values, got {dtype}")
    return dtype


def read(op: str, x: Tensor, x_scale: Tensor | None) -> Tensor:
    """The values of x that a convolution multiplies: of its codes, or rounded where there is a scale."""
    if x_scale is None:
        return x
    codes = torch.where(x == -128, torch.nan, x.float()) if x.dtype == torch.int8 else _codes(op, x, "x_scale", x_scale)
    return codes * x_scale


def written(op: str, y: Tensor, out_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A result as :func:`empty_image` lays it out: in ``dtype``, or its codes where there is a scale."""
    if out_scale is None:
        return as_image(y.to(dtype))
    return as_image(_codes(op, y, "out_scale", out_scale).nan_to_num_(nan=-128.0).to(torch.int8))


def _codes(op: str, x: Tensor, name: str, scale: Tensor) -> Tensor:
    """``x`` in whole steps of ``scale`` within +-127, NaN as it is."""
    if not 1e-36 <= float(scale) <= 1e36:
        raise ValueError(f"{op}: {name} must be in [1e-36, 1e36], got {float(scale)}")
    return (x.float() / scale).round_().clamp_(-127, 127)


def out_shape(
    x: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The shape of the result; ``padding`` is before each axis, then after each."""
    axes = len(weight_shape) - 2
    sizes = [
        (x.shape[2 + i] + padding[i] + padding[axes + i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(axes)
    ]
    return [x.shape[0], weight_shape[0], *sizes]


def channels_last(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous image of ``shape`` in which the channels of a position lie together."""
    strides, step = [0] * len(shape), shape[1]
    strides[1] = 1
    for i in reversed(range(2, len(shape))):
        strides[i], step = step, step * shape[i]
    strides[0] = step
    return strides


def empty_image(x: Tensor, shape: Sequence[int], out_scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """What the operators return, not filled in."""
    kind = torch.int8 if out_scale is not None else dtype or x.dtype
    return x.new_empty_strided(list(shape), channels_last(shape), dtype=kind)


def as_image(y: Tensor) -> Tensor:
    """``y`` with the strides of :func:`empty_image`."""
    return torch.empty_strided(y.shape, channels_last(y.shape), dtype=y.dtype, device=y.device).copy_(y)


def edges(padding: Sequence[int]) -> list[int]:
    """``padding`` as ``constant_pad_nd`` takes it: the last axis first, before and after."""
    axes = len(padding) // 2
    return [n for i in reversed(range(axes)) for n in (padding[i], padding[axes + i])]


def preactivation(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """The convolution and its bias in float32; ``weight`` is ``[out, in / groups, *kernel]``."""
    axes = weight.dim() - 2
    padded = torch.constant_pad_nd(x.float(), edges(padding))
    held = None if bias is None else bias.float()
    return torch.convolution(padded, weight, held, stride, [0] * axes, dilation, False, [0] * axes, groups)


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, activation: str, want_x: bool, want_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x and bias."""
    axes = weight.dim() - 2
    inner = grad.float()
    if activation != "none":
        inner = activation_backward(activation, inner, preactivation(x, weight, bias, stride, padding, dilation, groups))
    padded = torch.constant_pad_nd(x.float(), edges(padding))
    grad_x, _, grad_bias = aten.convolution_backward(
        inner, padded, weight, [weight.shape[0]], stride, [0] * axes, dilation, False, [0] * axes, groups,
        [want_x, False, want_bias],
    )  # fmt: skip
    if want_x:
        grad_x = torch.constant_pad_nd(grad_x, [-n for n in edges(padding)]).to(x.dtype)
    return grad_x, grad_bias.to(bias.dtype) if want_bias and bias is not None else None
