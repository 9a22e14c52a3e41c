"""``qcompile::linear_tiled_split``: siblings that read the same x, stacked on N, in one pass over it.

Each part of the weight starts a tile (``pack(..., parts=sizes)``); each output is its own contiguous tensor.
``exact``, ``x_scale`` and ``per_row`` as in ``linear_tiled``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.layouts.tiled import TILE
from qcompile.kernels.ops._tiled import (
    ceil_div,
    check_bias,
    check_input,
    check_rounding,
    check_weight,
    define_differentiable,
    dequantize_rows,
    rounded,
)

_OP = "qcompile::linear_tiled_split"

_SCHEMA = (
    "linear_tiled_split(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    "int[] sizes, bool exact=False, Tensor? x_scale=None, bool per_row=False) -> Tensor[]"
)


def _check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    sizes: Sequence[int],
) -> None:
    check_input(_OP, x)
    if not sizes or any(s < 1 for s in sizes):
        raise ValueError(f"{_OP}: sizes must be one or more positive row counts, got {list(sizes)}")
    check_weight(_OP, codes, scale, zero, bits, group_size, sum(ceil_div(s, TILE) for s in sizes), x.shape[-1])
    check_bias(_OP, bias, x, sum(sizes))


def _fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    sizes: Sequence[int],
    exact: bool = False,
    x_scale: Tensor | None = None,
    per_row: bool = False,
) -> list[Tensor]:
    _check(x, codes, scale, zero, bias, bits, group_size, sizes)
    check_rounding(_OP, exact, x_scale, per_row)
    return [x.new_empty([*x.shape[:-1], s]) for s in sizes]


def linear_tiled_split(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    sizes: Sequence[int],
    exact: bool = False,
    x_scale: Tensor | None = None,
    per_row: bool = False,
) -> list[Tensor]:
    """The reference, in plain torch and float32; raises ValueError on a mismatch."""
    _check(x, codes, scale, zero, bias, bits, group_size, sizes)
    check_rounding(_OP, exact, x_scale, per_row)
    weight = dequantize_rows(codes, scale, zero, bits, group_size, x.shape[-1])
    biases = [None] * len(sizes) if bias is None else list(bias.float().split(list(sizes)))
    y = rounded(_OP, x, x_scale, per_row).float()
    return [
        torch.nn.functional.linear(y, w, b).to(x.dtype) for w, b in zip(_parts(weight, sizes), biases, strict=True)
    ]


def _parts(weight: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of each part, padding dropped, from all packed rows."""
    padded = weight.split([ceil_div(s, TILE) * TILE for s in sizes])
    return [w[:s] for w, s in zip(padded, sizes, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, codes, scale, zero, bias, bits, group_size, sizes, _, x_scale, per_row = inputs
    if x_scale is not None or per_row:
        raise ValueError(f"{_OP}: rounded activations have no gradient here; put fake_quantize before the linear")
    ctx.save_for_backward(x, codes, scale, zero, bias)
    ctx.options = bits, group_size, list(sizes)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    x, codes, scale, zero, bias = ctx.saved_tensors
    bits, group_size, sizes = ctx.options
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        rows = codes.shape[0] * TILE
        dtype = torch.float32
        weight = torch.ops.qcompile.dequantize_tiled(codes, scale, zero, bits, group_size, rows, x.shape[-1], dtype)
        products = [g.float() @ w for g, w in zip(grads, _parts(weight, sizes), strict=True)]
        grad_x = torch.stack(products).sum(0).to(x.dtype)
    if bias is not None and ctx.needs_input_grad[4]:
        sums = [g.float().reshape(-1, s).sum(0) for g, s in zip(grads, sizes, strict=True)]
        grad_bias = torch.cat(sums).to(bias.dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None, None, None


define_differentiable(_SCHEMA, linear_tiled_split, _fake, _setup_context, _backward)
