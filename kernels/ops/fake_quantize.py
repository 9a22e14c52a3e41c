"""``qcompile::fake_quantize`` and ``fake_quantize_dynamic``: what an activation is after it was quantized and decoded.

Rounding is that of :func:`qcompile.kernels.numerics.encode`: a true division in float32, half to even, saturating. torch's
own ``fake_quantize_per_tensor_affine`` is not used: it multiplies with the reciprocal, which rounds other elements, turns
NaN into a finite number, and is several times slower than the four vectorized operators below.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.dtypes import QType, qtype
from qcompile.kernels.ops._library import define

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_qtype = functools.cache(qtype)


def _check(op: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"qcompile::{op}: x must be float32, float16 or bfloat16, got {x.dtype}; convert it first")


def _check_static(x: Tensor, scale: Tensor, name: str) -> QType:
    _check("fake_quantize", x)
    if scale.dim() != 0 or scale.dtype not in _FLOATS:
        got = f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"qcompile::fake_quantize: scale must be one float32 number (a 0-dim tensor), got {got}")
    return _qtype(name)


def _check_dynamic(x: Tensor, name: str) -> QType:
    _check("fake_quantize_dynamic", x)
    if x.dim() < 1:
        raise ValueError("qcompile::fake_quantize_dynamic: x must be [..., features], got a scalar")
    return _qtype(name)


def _rounded(x: Tensor, scale: Tensor, kind: QType, in_place: bool) -> Tensor:
    """``x`` on ``scale * [qmin..qmax]``, in float32; ``scale`` broadcasts against it."""
    steps = _steps(x, scale)
    if not in_place:
        codes = steps.clamp(kind.qmin, kind.qmax)
        return (codes.to(kind.dtype).float() if kind.is_float else codes.round()) * scale
    steps.clamp_(kind.qmin, kind.qmax)
    return (steps.to(kind.dtype).float() if kind.is_float else steps.round_()).mul_(scale)


def _steps(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale``; a scale of 0 (nothing but zeros was seen) decodes every code to 0, and must not make 0 / 0."""
    return torch.div(x.float(), torch.where(scale == 0, 1.0, scale))


def fake_quantize(x: Tensor, scale: Tensor, qtype: str, in_place: bool = True) -> Tensor:
    """``x`` rounded onto ``scale * [qmin..qmax]`` of a quantized dtype, in the shape and dtype of ``x``.

    Values out of range saturate, infinity too; NaN stays NaN. The gradient passes straight through where ``x`` is in range
    and is 0 outside. ``scale`` gets the gradient of LSQ (Esser et al. 2020, equation 3), summed over ``x``; the step size's
    gradient scale of their section 2.2 is left to the caller.

    Args:
        x: any shape, float32, float16 or bfloat16; arithmetic is in float32.
        scale: 0-dim, positive; where it is 0 the result is 0.
        qtype: name of a quantized dtype.
        in_place: reuse the memory of what is computed on the way; no part of the operator.

    Raises:
        TypeError: ``x`` of another dtype.
        ValueError: a scale that is not a single number, or an unknown quantized dtype.
    """
    kind = _check_static(x, scale, qtype)
    return _rounded(x, scale.float(), kind, in_place).to(x.dtype)


def fake_quantize_dynamic(x: Tensor, qtype: str, in_place: bool = True) -> Tensor:
    """``x`` rounded with one scale a token: the largest magnitude of its last axis becomes ``qmax``.

    A token of zeros stays as it is; one that holds NaN or infinity becomes NaN. The gradient passes straight through.

    Args:
        x: ``[..., features]``, float32, float16 or bfloat16; arithmetic is in float32.
        qtype: name of a quantized dtype.
        in_place: reuse the memory of what is computed on the way; no part of the operator.

    Raises:
        TypeError: ``x`` of another dtype.
        ValueError: a scalar, or an unknown quantized dtype.
    """
    kind = _check_dynamic(x, qtype)
    if x.shape[-1] == 0:
        return torch.empty_like(x)
    scale = x.abs().amax(-1, keepdim=True).float() / kind.qmax
    return _rounded(x, scale, kind, in_place).to(x.dtype)


def decomposed(x: Tensor, scale: Tensor, qtype: str) -> Tensor:
    """:func:`fake_quantize` in functional operators, as a compiler wants it."""
    return fake_quantize(x, scale, qtype, in_place=False)


def decomposed_dynamic(x: Tensor, qtype: str) -> Tensor:
    """:func:`fake_quantize_dynamic` in functional operators, as a compiler wants it."""
    return fake_quantize_dynamic(x, qtype, in_place=False)


def _fake(x: Tensor, scale: Tensor, qtype: str) -> Tensor:
    _check_static(x, scale, qtype)
    return torch.empty_like(x)


def _dynamic_fake(x: Tensor, qtype: str) -> Tensor:
    _check_dynamic(x, qtype)
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, ctx.qtype = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, scale = ctx.saved_tensors
    kind = _qtype(ctx.qtype)
    steps = _steps(x, scale.float())
    inside = (steps >= kind.qmin) & (steps <= kind.qmax)
    grad_x = torch.where(inside, grad, 0) if ctx.needs_input_grad[0] else None
    grad_scale = None
    if ctx.needs_input_grad[1]:
        codes = steps.clamp(kind.qmin, kind.qmax)
        codes = codes.to(kind.dtype).float() if kind.is_float else codes.round()
        slope = torch.where(inside, codes - steps, codes)
        grad_scale = (grad.float() * slope).sum().to(scale.dtype)
    return grad_x, grad_scale, None


def _dynamic_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _dynamic_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


define(
    "fake_quantize(Tensor x, Tensor scale, str qtype) -> Tensor",
    fake_quantize,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
define(
    "fake_quantize_dynamic(Tensor x, str qtype) -> Tensor",
    fake_quantize_dynamic,
    _dynamic_fake,
    setup_context=_dynamic_setup,
    backward=_dynamic_backward,
)
