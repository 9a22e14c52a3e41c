"""``qcompile::linear``: float activations times a weight in codes, and what follows element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define
from qcompile.kernels.ops._tiled import ACTIVATIONS, activation_backward
from qcompile.kernels.ops.dequantize import dequantize
from qcompile.kernels.qtensor import check_parts
from qcompile.kernels.scheme import Scheme


def linear(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, shape: list[int],
    activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None, glu: bool = False,
) -> Tensor:  # fmt: skip
    """``act(x @ W.T + bias) [* mul] [+ add]`` with W of ``shape`` ``[N, K]`` in codes; ``x`` is ``[..., K]``.

    Args:
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``sigmoid`` or ``tanh``.
        mul, add: of the result's shape.
        glu: the first N/2 rows are a gate: ``act(x @ Wg.T + bg) * (x @ Wu.T + bu)``.

    Returns:
        ``[..., N]`` (``[..., N/2]`` with ``glu``), the dtype of ``x``.
    """
    _check_linear(x, data, scale, zero, scheme, shape, activation, mul, add, glu)
    out = torch.nn.functional.linear(x, dequantize(data, scale, zero, scheme, shape, x.dtype), bias)
    if glu:
        gate, up = out.chunk(2, dim=-1)
        out = ACTIVATIONS[activation](gate) * up
    elif activation != "none":
        out = ACTIVATIONS[activation](out)
    out = out if mul is None else out * mul
    return out if add is None else out + add


def _linear_fake(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, shape: list[int],
    activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None, glu: bool = False,
) -> Tensor:  # fmt: skip
    _check_linear(x, data, scale, zero, scheme, shape, activation, mul, add, glu)
    return x.new_empty((*x.shape[:-1], shape[0] // 2 if glu else shape[0]))


def _check_linear(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, shape: list[int],
    activation: str, mul: Tensor | None, add: Tensor | None, glu: bool,
) -> None:  # fmt: skip
    check_parts(data, scale, zero, Scheme.parse(scheme), shape)
    check_features(x, shape)
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if glu and shape[0] % 2:
        raise ValueError(f"a gated linear needs an even number of rows, got a weight of shape {list(shape)}")
    result = (*x.shape[:-1], shape[0] // 2 if glu else shape[0])
    for name, operand in (("mul", mul), ("add", add)):
        if operand is None:
            continue
        if tuple(operand.shape) != result:
            raise ValueError(f"{name} must have the shape {list(result)} of the result, got {list(operand.shape)}")
        if operand.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, got {operand.dtype}")


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, scale, zero, bias, ctx.scheme, ctx.shape, ctx.activation, mul, _add, ctx.glu = inputs
    ctx.save_for_backward(x, data, scale, zero, bias, mul)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The decoded weight's gradients; what lies between product and result is computed again."""
    x, data, scale, zero, bias, mul = ctx.saved_tensors
    # Arguments left at their defaults have no entry.
    needs = [*ctx.needs_input_grad, *([False] * (11 - len(ctx.needs_input_grad)))]
    weight = torch.ops.qcompile.dequantize(data, scale, zero, ctx.scheme, ctx.shape, x.dtype)
    grad_add = grad if needs[9] else None
    grad_mul = None
    if ctx.activation != "none" or ctx.glu or mul is not None:
        pre = torch.nn.functional.linear(x, weight, bias)
        parts = pre.chunk(2, dim=-1) if ctx.glu else (pre,)
        activated = ACTIVATIONS[ctx.activation](parts[0])
        if needs[8]:
            grad_mul = grad * (activated * parts[1] if ctx.glu else activated)
        grad = grad if mul is None else grad * mul
        if ctx.glu:
            gate, up = parts
            grad = torch.cat([activation_backward(ctx.activation, grad * up, gate), grad * activated], dim=-1)
        else:
            grad = activation_backward(ctx.activation, grad, pre)
    grad_x = grad @ weight if needs[0] else None
    grad_bias = sum_rows(grad) if needs[4] else None
    return grad_x, None, None, None, grad_bias, None, None, None, grad_mul, grad_add, None


def sum_rows(grad: Tensor) -> Tensor:
    """The gradient of a bias: the sum over all axes but the last."""
    return grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad


def check_features(x: Tensor, shape: Sequence[int]) -> None:
    """Raise a ValueError unless the last axis of ``x`` is the K of a weight of shape ``[N, K]``."""
    if len(shape) != 2:
        raise ValueError(f"a linear weight has shape [N, K], got {list(shape)}")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x of shape {list(x.shape)} does not fit a weight of shape {list(shape)}: its last axis must be K"
        )


define(
    "linear(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, str scheme, int[] shape, "
    'str activation="none", Tensor? mul=None, Tensor? add=None, bool glu=False) -> Tensor',
    linear,
    _linear_fake,
    setup_context=_linear_setup,
    backward=_linear_backward,
)
