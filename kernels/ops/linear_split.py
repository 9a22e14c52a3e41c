"""``qcompile::linear_split``: several linears that read the same input, their weights stacked, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define
from qcompile.kernels.ops.dequantize import dequantize
from qcompile.kernels.ops.linear import check_features, sum_rows
from qcompile.kernels.qtensor import check_parts
from qcompile.kernels.scheme import Scheme


def linear_split(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, shape: list[int],
    sizes: list[int],
) -> list[Tensor]:  # fmt: skip
    """``x @ W.T + bias`` cut along its last axis in parts of ``sizes``, each contiguous; W is ``[sum(sizes), K]``."""
    _check(x, data, scale, zero, scheme, shape, sizes)
    out = torch.nn.functional.linear(x, dequantize(data, scale, zero, scheme, shape, x.dtype), bias)
    # clone, for a single part would else be returned twice under one storage
    return [part.clone(memory_format=torch.contiguous_format) for part in out.split(sizes, dim=-1)]


def _fake(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, shape: list[int],
    sizes: list[int],
) -> list[Tensor]:  # fmt: skip
    _check(x, data, scale, zero, scheme, shape, sizes)
    return [x.new_empty((*x.shape[:-1], size)) for size in sizes]


def _check(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, shape: list[int], sizes: list[int]
) -> None:
    check_parts(data, scale, zero, Scheme.parse(scheme), shape)
    check_features(x, shape)
    if sum(sizes) != shape[0] or min(sizes, default=0) < 1:
        raise ValueError(f"sizes {list(sizes)} do not cut a weight of {shape[0]} rows into parts")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, data, scale, zero, _bias, ctx.scheme, ctx.shape, _sizes = inputs
    ctx.save_for_backward(data, scale, zero)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    grad = torch.cat(list(grads), dim=-1)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.qcompile.dequantize(*ctx.saved_tensors, ctx.scheme, ctx.shape, ctx.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = sum_rows(grad)
    return grad_x, None, None, None, grad_bias, None, None, None


define(
    "linear_split(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, str scheme, int[] shape, int[] sizes) "
    "-> Tensor[]",
    linear_split,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
