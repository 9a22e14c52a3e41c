"""What the operators on the tiled layout share: checks that work on symbolic sizes, and the plain-torch decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.layouts.tiled import CODES, TILE, WIDTHS, Geometry, unpack_codes, untile_rows
from qcompile.kernels.ops._library import define, lib

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": lambda x: torch.nn.functional.hardtanh(x, 0.0, 6.0),
    "hardswish": lambda x: torch.nn.functional.hardswish(x),
    "hardsigmoid": lambda x: torch.nn.functional.hardsigmoid(x),
}
"""Names an ``activation`` argument may have."""


def define_differentiable(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...]], None],
    backward: Callable[..., tuple[Any, ...]],
    any_strides: bool = False,
    plain: bool = False,
) -> None:
    """Define ``name`` with an autograd formula, and ``name_forward``, the same operator without one.

    A formula is Python code in the dispatcher, which costs 4 us a call even when no gradient is wanted. So ``name``
    computes through ``name_forward``: what AOTAutograd traces, and thus every compiled program, holds the bare
    operator, and pays nothing. ``setup_context(ctx, inputs)`` and ``backward(ctx, *grads)`` are those of
    :class:`torch.autograd.Function`.

    ``plain``: there is also an overload ``name_forward.plain``, without the arguments that have defaults. It is taken where
    they are not given, as seven of them cost half a microsecond a call.
    """
    name = schema.partition("(")[0]
    forward_name = f"{name}_forward"
    define(schema, reference, fake, any_strides=any_strides)
    define(schema.replace(name, forward_name, 1), reference, fake, any_strides=any_strides)
    bare = short = getattr(torch.ops.qcompile, forward_name).default
    arguments, result = schema.removeprefix(f"{name}(").rsplit(")", 1)
    required = [argument for argument in arguments.split(", ") if "=" not in argument]
    if plain:
        define(f"{forward_name}.plain({', '.join(required)}){result}", reference, fake, any_strides=any_strides)
        short = getattr(torch.ops.qcompile, forward_name).plain

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            setup_context(ctx, inputs)
            with torch._C._AutoDispatchBelowAutograd():
                out = bare(*inputs)
            return tuple(out) if isinstance(out, list) else out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    def autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            out = Formula.apply(*torch._library.utils.fill_defaults(bare._schema, inputs, {})[0])
            return list(out) if isinstance(out, tuple) else out
        with torch._C._AutoDispatchBelowAutograd():
            return (short if len(inputs) == len(required) else bare)(*inputs)  # trailing defaults do not arrive here

    lib.impl(name, autograd, "Autograd")


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return (a + b - 1) // b


def check_weight(
    op: str, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, tiles: int, cols: int
) -> None:
    """Raise ValueError unless codes, scale and zero are a tiled weight of that many tiles and ``cols`` columns."""
    if bits not in WIDTHS:
        raise ValueError(f"{op}: bits must be one of {WIDTHS}, got {bits}")
    if group_size < 0:
        raise ValueError(f"{op}: group_size must be positive, or 0 for one group a row, got {group_size}")
    if codes.dtype not in CODES or codes.dim() != 3:
        got = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(f"{op}: codes must be uint8 or a float8 [tiles, blocks, {64 * bits}], got {got}")
    if codes.dtype != torch.uint8 and bits != 8:
        raise ValueError(f"{op}: bits must be 8 for float8 codes, got {bits}")
    geometry = Geometry.of(cols, group_size)
    expected = (tiles, geometry.blocks, 64 * bits)
    if any(a != b for a, b in zip(codes.shape, expected, strict=True)):
        raise ValueError(
            f"{op}: codes must be {list(expected)} for {cols} columns, bits={bits}, group_size={group_size}, "
            f"got {list(codes.shape)}"
        )
    if scale.dtype not in FLOATS:
        raise ValueError(f"{op}: scale must be float32, float16 or bfloat16, got {scale.dtype}")
    expected = (tiles, geometry.groups, TILE)
    if scale.dim() != 3 or any(a != b for a, b in zip(scale.shape, expected, strict=True)):
        raise ValueError(f"{op}: scale must be {list(expected)}, got {list(scale.shape)}")
    if zero is not None:
        if codes.dtype != torch.uint8:
            raise ValueError(f"{op}: zero must be None for float8 codes")
        if zero.dtype not in (torch.uint8, scale.dtype):
            raise ValueError(f"{op}: zero must be uint8 or {scale.dtype} like scale, got {zero.dtype}")
        if zero.dim() != 3 or any(a != b for a, b in zip(zero.shape, expected, strict=True)):
            raise ValueError(f"{op}: zero must be {list(expected)} like scale, got {list(zero.shape)}")
    for name, tensor in (("codes", codes), ("scale", scale), ("zero", zero)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}")


def check_input(op: str, x: Tensor) -> None:
    """Raise ValueError unless x is a float tensor with a last dimension."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be float32, float16 or bfloat16, got {x.dtype}; convert it first")
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., in_features], got a scalar")


def check_bias(op: str, bias: Tensor | None, x: Tensor, size: int) -> None:
    """Raise ValueError unless bias is None or ``[size]`` in float32 or x's dtype."""
    if bias is None:
        return
    if bias.dim() != 1 or bias.shape[0] != size:
        raise ValueError(f"{op}: bias must be [{size}], got {list(bias.shape)}")
    if bias.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"{op}: bias must be float32 or {x.dtype} like x, got {bias.dtype}")


def check_rounding(op: str, exact: bool, x_scale: Tensor | None, per_row: bool) -> None:
    """Raise ValueError unless at most one way of rounding x is asked for, and ``x_scale`` is a float32 scalar."""
    if exact + per_row + (x_scale is not None) > 1:
        raise ValueError(f"{op}: give one of exact, x_scale and per_row, got more")
    if x_scale is not None and (x_scale.dtype != torch.float32 or x_scale.dim() != 0):
        raise ValueError(f"{op}: x_scale must be a float32 scalar, got {x_scale.dtype} {list(x_scale.shape)}")


def rounded(op: str, x: Tensor, x_scale: Tensor | None, per_row: bool) -> Tensor:
    """``x`` as the product is to read it, in float32 where it is rounded."""
    if x_scale is not None:
        if not 1e-36 <= float(x_scale) <= 1e36:
            raise ValueError(f"{op}: x_scale must be in [1e-36, 1e36], got {float(x_scale)}")
        return (x.float() / x_scale).round_().clamp_(-127, 127) * x_scale
    if not per_row or x.shape[-1] == 0:
        return x
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-127, 127) * scale


def dequantize_rows(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, cols: int) -> Tensor:
    """The float32 weight in packed row order, padding rows (zeros) included: ``[tiles * 16, cols]``."""
    u = unpack_codes(codes, bits, group_size, cols).to(torch.float32)
    size = group_size if 0 < group_size < cols else cols
    group = torch.arange(cols, device=codes.device) // max(size, 1)
    s = untile_rows(scale).to(torch.float32)[:, group]
    if zero is None:
        return (u - 2 ** (bits - 1) if codes.dtype == torch.uint8 else u) * s
    z = untile_rows(zero).to(torch.float32)[:, group]
    return (u - z) * s if zero.dtype == torch.uint8 else u * s + z


def glu_rows(matrix: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """The gate and the up rows of a packed glu weight, padding dropped, from all its rows ``[tiles * 16, ...]``."""
    pairs = matrix.reshape(-1, 2, TILE, *matrix.shape[1:])
    return tuple(pairs[:, i].reshape(-1, *matrix.shape[1:])[:out_features] for i in (0, 1))  # type: ignore[return-value]


def activation_backward(name: str, grad: Tensor, pre: Tensor) -> Tensor:
    """The gradient of ``ACTIVATIONS[name]`` at ``pre``."""
    aten = torch.ops.aten
    match name:
        case "none":
            return grad
        case "relu":
            return aten.threshold_backward(grad, pre, 0)
        case "gelu" | "gelu_tanh":
            return aten.gelu_backward(grad, pre, approximate="tanh" if name == "gelu_tanh" else "none")
        case "silu":
            return aten.silu_backward(grad, pre)
        case "sigmoid":
            return aten.sigmoid_backward(grad, torch.sigmoid(pre))
        case "tanh":
            return aten.tanh_backward(grad, torch.tanh(pre))
        case "relu6":
            return aten.hardtanh_backward(grad, pre, 0.0, 6.0)
        case "hardswish":
            return aten.hardswish_backward(grad, pre)
        case "hardsigmoid":
            return aten.hardsigmoid_backward(grad, pre)
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
