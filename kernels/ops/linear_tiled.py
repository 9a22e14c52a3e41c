"""``qcompile::linear_tiled``: a linear on a packed weight, with its epilogue.

``y = act(x @ W.T + bias) [* mul] [+ add]``; with ``glu``, ``y = act(x @ Wg.T + bg) * (x @ Wu.T + bu) [* mul] [+ add]``
(bias = gate first, then up). The reference decodes the weight and multiplies in float32; the CPU kernel quantizes x to
int8 by blocks of 32 on the fly, unless ``exact``.

``x_scale`` (float32 scalar) and ``per_row`` (the largest magnitude of each row of x / 127) say that x is to be rounded, as
``fake_quantize`` and ``fake_quantize_dynamic`` do it: ``scale * clamp(round(x / scale), -127, 127)``. Reference and kernel
agree on that; infinity saturates at ``x_scale`` and makes the row NaN with ``per_row``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.layouts.tiled import TILE
from qcompile.kernels.ops._epilogue import check_operands, check_result
from qcompile.kernels.ops._tiled import (
    ACTIVATIONS,
    activation_backward,
    ceil_div,
    check_bias,
    check_input,
    check_rounding,
    check_weight,
    define_differentiable,
    dequantize_rows,
    glu_rows,
    rounded,
)

_OP = "qcompile::linear_tiled"

_SCHEMA = (
    "linear_tiled(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    'int out_features, str activation="none", Tensor? mul=None, Tensor? add=None, bool glu=False, bool exact=False, '
    "Tensor? x_scale=None, bool per_row=False) -> Tensor"
)


def _check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activation: str,
    mul: Tensor | None,
    add: Tensor | None,
    glu: bool,
) -> None:
    check_input(_OP, x)
    check_result(_OP, out_features, activation)
    halves = 2 if glu else 1
    check_weight(_OP, codes, scale, zero, bits, group_size, halves * ceil_div(out_features, TILE), x.shape[-1])
    check_bias(_OP, bias, x, halves * out_features)
    check_operands(_OP, x, out_features, mul, add)


def _fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activation: str = "none",
    mul: Tensor | None = None,
    add: Tensor | None = None,
    glu: bool = False,
    exact: bool = False,
    x_scale: Tensor | None = None,
    per_row: bool = False,
) -> Tensor:
    _check(x, codes, scale, zero, bias, bits, group_size, out_features, activation, mul, add, glu)
    check_rounding(_OP, exact, x_scale, per_row)
    return x.new_empty([*x.shape[:-1], out_features])


def linear_tiled(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activation: str = "none",
    mul: Tensor | None = None,
    add: Tensor | None = None,
    glu: bool = False,
    exact: bool = False,
    x_scale: Tensor | None = None,
    per_row: bool = False,
) -> Tensor:
    """The reference, in plain torch and float32 (see the module's docstring); raises ValueError on a mismatch."""
    _check(x, codes, scale, zero, bias, bits, group_size, out_features, activation, mul, add, glu)
    check_rounding(_OP, exact, x_scale, per_row)
    weight = dequantize_rows(codes, scale, zero, bits, group_size, x.shape[-1])
    act = ACTIVATIONS[activation]
    pre = _preactivation(rounded(_OP, x, x_scale, per_row), weight, bias, out_features, glu)
    y = act(pre[0]) * pre[1] if glu else act(pre[0])
    if mul is not None:
        y = y * mul
    if add is not None:
        y = y + add
    return y.to(x.dtype).contiguous()


def _preactivation(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, glu: bool) -> list[Tensor]:
    """``x @ W.T + bias`` in float32, one tensor, or gate and up, from all packed rows of the weight."""
    weights = list(glu_rows(weight, out_features)) if glu else [weight[:out_features]]
    biases = [None] * len(weights) if bias is None else list(bias.float().chunk(len(weights)))
    return [torch.nn.functional.linear(x.float(), w, b) for w, b in zip(weights, biases, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, codes, scale, zero, bias, bits, group_size, out_features, activation, mul, add, glu, _, x_scale, per_row = inputs
    if x_scale is not None or per_row:
        raise ValueError(f"{_OP}: rounded activations have no gradient here; put fake_quantize before the linear")
    ctx.save_for_backward(x, codes, scale, zero, bias, mul)
    ctx.options = bits, group_size, out_features, activation, glu
    ctx.has_add = add is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for x, bias, mul and add, with the decoded float weight; pre-activations are computed again."""
    x, codes, scale, zero, bias, mul = ctx.saved_tensors
    bits, group_size, out_features, activation, glu = ctx.options
    rows, cols = codes.shape[0] * TILE, x.shape[-1]
    # float32 throughout: the weight is decoded once, and half precision would lose what the forward kept
    weight = torch.ops.qcompile.dequantize_tiled(codes, scale, zero, bits, group_size, rows, cols, torch.float32)
    act = ACTIVATIONS[activation]
    grad_y = grad.float()
    grad_add = grad if ctx.has_add else None
    grad_mul = None
    plain = activation == "none" and not glu
    pre = [] if plain and mul is None else _preactivation(x, weight, bias, out_features, glu)
    if mul is not None:
        inner = act(pre[0]) * pre[1] if glu else act(pre[0])
        grad_mul = (grad_y * inner).to(mul.dtype)
        grad_y = grad_y * mul
    if glu:
        gate, up = pre
        grads = [activation_backward(activation, grad_y * up, gate), grad_y * act(gate)]
        weights = list(glu_rows(weight, out_features))
    else:
        grads = [grad_y if plain else activation_backward(activation, grad_y, pre[0])]
        weights = [weight[:out_features]]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        products = [g @ w for g, w in zip(grads, weights, strict=True)]
        grad_x = (products[0] + products[1] if glu else products[0]).to(x.dtype)
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = torch.cat([g.reshape(-1, out_features).sum(0) for g in grads]).to(bias.dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None, grad_mul, grad_add, None, None, None, None


define_differentiable(_SCHEMA, linear_tiled, _fake, _setup_context, _backward, plain=True)
