"""``qcompile::grouped_linear``: one linear for each of a stack of weights (mixture of experts), the stack in codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define
from qcompile.kernels.ops.dequantize import dequantize
from qcompile.kernels.qtensor import check_parts
from qcompile.kernels.scheme import Scheme


def grouped_linear(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, offsets: Tensor | None, scheme: str, shape: list[int]
) -> Tensor:
    """Linears with the weights W of ``shape`` ``[E, N, K]``.

    Args:
        x: without offsets ``[E, M, K]``, expert e takes ``x[e]``; with offsets ``[T, K]``, rows sorted by expert.
        offsets: int32 or int64 ``[E]``, where each expert's rows end (the convention of ``torch._grouped_mm``); rows
            after the last end give zeros.

    Returns:
        ``[E, M, N]`` or ``[T, N]``, the dtype of ``x``.
    """
    _check(x, data, scale, zero, offsets, scheme, shape)
    weight = dequantize(data, scale, zero, scheme, shape, x.dtype)
    if offsets is None:
        return torch.bmm(x, weight.transpose(1, 2))
    # The expert of each row is found on the device, without a synchronization; each row then takes part in every
    # product and keeps one. Plain and slow: kernels do better.
    owner = torch.searchsorted(offsets.to(torch.int64), torch.arange(x.shape[0], device=x.device), right=True)
    out = x.new_zeros(x.shape[0], shape[1])
    for expert in range(shape[0]):
        out = torch.where((owner == expert).unsqueeze(1), x @ weight[expert].t(), out)
    return out


def _grouped_linear_fake(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, offsets: Tensor | None, scheme: str, shape: list[int]
) -> Tensor:
    _check(x, data, scale, zero, offsets, scheme, shape)
    return x.new_empty((*x.shape[:-1], shape[1]))


def _check(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, offsets: Tensor | None, scheme: str, shape: list[int]
) -> None:
    if len(shape) != 3:
        raise ValueError(f"a stack of linear weights has shape [E, N, K], got {list(shape)}")
    check_parts(data, scale, zero, Scheme.parse(scheme), shape)
    if offsets is not None and offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be an int32 or int64 tensor, got {offsets.dtype}")
    if offsets is None:
        fits = x.dim() == 3 and x.shape[0] == shape[0] and x.shape[2] == shape[2]
    else:
        fits = x.dim() == 2 and x.shape[1] == shape[2] and tuple(offsets.shape) == (shape[0],)
    if not fits:
        ends = "no offsets" if offsets is None else f"offsets of shape {list(offsets.shape)}"
        raise ValueError(
            f"x of shape {list(x.shape)} with {ends} does not fit weights of shape {list(shape)}: expected "
            f"[E, M, K] without offsets, or [T, K] with offsets of shape [E]"
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, scale, zero, offsets, ctx.scheme, ctx.shape = inputs
    ctx.save_for_backward(data, scale, zero, offsets)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    data, scale, zero, offsets = ctx.saved_tensors
    weight = torch.ops.qcompile.dequantize(data, scale, zero, ctx.scheme, ctx.shape, ctx.dtype)
    if offsets is None:
        return torch.bmm(grad, weight), None, None, None, None, None, None
    owner = torch.searchsorted(offsets.to(torch.int64), torch.arange(grad.shape[0], device=grad.device), right=True)
    grad_x = grad.new_zeros(grad.shape[0], ctx.shape[2])
    for expert in range(ctx.shape[0]):
        grad_x = torch.where((owner == expert).unsqueeze(1), grad @ weight[expert], grad_x)
    return grad_x, None, None, None, None, None, None


define(
    "grouped_linear(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? offsets, str scheme, int[] shape) "
    "-> Tensor",
    grouped_linear,
    _grouped_linear_fake,
    setup_context=_setup,
    backward=_backward,
)
