"""``qcompile::linear_planes`` and ``linear_planes_split``: linears on a weight in the planes layout, with an epilogue.

``y = act(x @ W.T + bias) [* mul] [+ add]``; with ``glu`` the first half of the rows of W is a gate:
``y = act(x @ Wg.T + bg) * (x @ Wu.T + bu) [* mul] [+ add]``. The reference decodes the weight and multiplies in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.ops._epilogue import check_operands, check_result, epilogue
from qcompile.kernels.ops._planes import check_planes, dequantize_planes_rows
from qcompile.kernels.ops._tiled import ACTIVATIONS, activation_backward, check_bias, check_input, define_differentiable

_WEIGHT = "Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, str kind, int group_size, "
_LINEAR = (
    f"linear_planes({_WEIGHT}int out_features, str activation=\"none\", Tensor? mul=None, Tensor? add=None, "
    "bool glu=False) -> Tensor"
)  # fmt: skip
_SPLIT = f"linear_planes_split({_WEIGHT}int[] sizes) -> Tensor[]"


def check_linear_planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None,
    glu: bool = False,
) -> None:  # fmt: skip
    """Raise ValueError unless the arguments of ``linear_planes`` fit each other."""
    op = "qcompile::linear_planes"
    check_input(op, x)
    check_result(op, out_features, activation)
    rows = 2 * out_features if glu else out_features
    check_planes(op, codes, scale, zero, bits, kind, group_size, (rows,), x.shape[-1])
    check_bias(op, bias, x, rows)
    check_operands(op, x, out_features, mul, add)


def linear_planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None,
    glu: bool = False,
) -> Tensor:  # fmt: skip
    """The reference (see the module's docstring).

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16.
        codes, scale, zero: ``[N, ...]`` as :mod:`qcompile.kernels.layouts.planes` says (``2 * out_features`` rows with glu).
        bias: ``[N]``. mul, add: the result's shape and dtype.
        kind: ``int``, or the float8 that the bytes are: ``e4m3fn``, ``e4m3fnuz``, ``e5m2``.

    Returns:
        ``[..., out_features]``, contiguous, the dtype of x.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    check_linear_planes(x, codes, scale, zero, bias, bits, kind, group_size, out_features, activation, mul, add, glu)
    pre = _product(x, codes, scale, zero, bias, bits, kind, group_size)
    return epilogue(pre, activation, mul, add, glu).to(x.dtype).contiguous()


def _linear_fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None,
    glu: bool = False,
) -> Tensor:  # fmt: skip
    check_linear_planes(x, codes, scale, zero, bias, bits, kind, group_size, out_features, activation, mul, add, glu)
    return x.new_empty([*x.shape[:-1], out_features])


def _product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str, group_size: int
) -> Tensor:
    weight = dequantize_planes_rows(codes, scale, zero, bits, kind, group_size, x.shape[-1])
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())


def _linear_setup(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, codes, scale, zero, bias, *options, activation, mul, add, glu = inputs
    ctx.save_for_backward(x, codes, scale, zero, bias, mul)
    ctx.options = *options[:3], activation, glu
    ctx.has_add = add is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for x, bias, mul and add, with the decoded weight; what lies before the activation is computed again."""
    x, codes, scale, zero, bias, mul = ctx.saved_tensors
    bits, kind, group_size, activation, glu = ctx.options
    weight = torch.ops.qcompile.dequantize_planes(codes, scale, zero, bits, kind, group_size, x.shape[-1], torch.float32)
    act = ACTIVATIONS[activation]
    wide, grad_mul = grad.float(), None
    if activation != "none" or glu or mul is not None:
        pre = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
        gate, up = pre.chunk(2, dim=-1) if glu else (pre, None)
        if mul is not None:
            grad_mul = (wide * (act(gate) if up is None else act(gate) * up)).to(mul.dtype)
            wide = wide * mul
        parts = [activation_backward(activation, wide if up is None else wide * up, gate)]
        wide = parts[0] if up is None else torch.cat([*parts, wide * act(gate)], dim=-1)
    grad_x = (wide @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_bias = None
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = wide.reshape(-1, wide.shape[-1]).sum(0).to(bias.dtype)
    nothing = (None,) * 4
    return grad_x, None, None, None, grad_bias, *nothing, None, grad_mul, grad if ctx.has_add else None, None


def check_split(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, sizes: Sequence[int],
) -> None:  # fmt: skip
    """Raise ValueError unless the arguments of ``linear_planes_split`` fit each other."""
    op = "qcompile::linear_planes_split"
    check_input(op, x)
    if not sizes or any(s < 1 for s in sizes):
        raise ValueError(f"{op}: sizes must be one or more positive row counts, got {list(sizes)}")
    check_planes(op, codes, scale, zero, bits, kind, group_size, (sum(sizes),), x.shape[-1])
    check_bias(op, bias, x, sum(sizes))


def linear_planes_split(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Siblings that read the same x, stacked on N, in one pass over it; each output is its own contiguous tensor."""
    check_split(x, codes, scale, zero, bias, bits, kind, group_size, sizes)
    pre = _product(x, codes, scale, zero, bias, bits, kind, group_size)
    return [part.to(x.dtype).contiguous() for part in pre.split(list(sizes), dim=-1)]


def _split_fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    check_split(x, codes, scale, zero, bias, bits, kind, group_size, sizes)
    return [x.new_empty([*x.shape[:-1], s]) for s in sizes]


def _split_setup(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, codes, scale, zero, bias, *options, _ = inputs
    ctx.save_for_backward(x, codes, scale, zero, bias)
    ctx.options = options


def _split_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    x, codes, scale, zero, bias = ctx.saved_tensors
    grad, grad_x, grad_bias = torch.cat([g.float() for g in grads], dim=-1), None, None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.qcompile.dequantize_planes(codes, scale, zero, *ctx.options, x.shape[-1], torch.float32)
        grad_x = (grad @ weight).to(x.dtype)
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None


define_differentiable(_LINEAR, linear_planes, _linear_fake, _linear_setup, _linear_backward)
define_differentiable(_SPLIT, linear_planes_split, _split_fake, _split_setup, _split_backward)
