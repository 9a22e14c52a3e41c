"""Choosing scale and zero point of a weight from its values: max-abs, min-max, an MSE-optimal clip, half-quadratic.

Each function sees the weight as rows of runs: ``[runs, length]``, one run for each scale. Results are rounded to the
scale's storage dtype *before* the codes are computed, so that a code is always the nearest for the stored scale.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qcompile.kernels.hqq import HalfQuadratic
from qcompile.kernels.runs import cut, squared_error, steps, stored
from qcompile.kernels.scheme import Scheme

Clip: TypeAlias = Literal["max", "mse", "hqq"]
CLIPS: tuple[Clip, ...] = ("max", "mse", "hqq")

#: Fractions of the full range that the MSE search tries, largest first.
_SHRINK = tuple(1.0 - 0.03 * i for i in range(20))


def choose(x: Tensor, scheme: Scheme, clip: Clip | HalfQuadratic = "max") -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for ``x``.

    An all-zero run gets scale 1, so that it decodes to exact zeros. A scale too small for its storage dtype becomes the
    smallest one that dtype has.

    Args:
        x: float tensor, any shape that fits the scheme's granularity.
        clip: ``"max"`` covers the full range, with the zero point rounded to the side that serves the values better;
            ``"mse"`` shrinks it to where the squared error is least (20 candidates), then fits the scale to the codes;
            ``"hqq"`` goes on from there with the half-quadratic solver (integer dtypes only), which fits the zero point
            too and never ends with a larger squared error; a :class:`~qcompile.kernels.hqq.HalfQuadratic`: the same with
            other settings than its own.

    Returns:
        ``(scale, zero)``, both of shape ``scheme.scale_shape(x.shape)``; zero is None for a symmetric scheme.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: NaN or infinity in ``x``, an unknown ``clip``, ``"hqq"`` for a float8 dtype, or a scale too large for
            the scale dtype.
    """
    if not x.is_floating_point():
        raise TypeError(f"only floating point tensors can be quantized, got {x.dtype}")
    if not isinstance(clip, HalfQuadratic) and clip not in CLIPS:
        raise ValueError(f"unknown clip {clip!r}; allowed: {', '.join(CLIPS)}")
    solver = clip if isinstance(clip, HalfQuadratic) else HalfQuadratic() if clip == "hqq" else None
    if solver is not None:
        solver.check(scheme)
    shape = scheme.scale_shape(x.shape)
    if x.numel() == 0:
        scale = torch.ones(shape, dtype=scheme.scale_dtype, device=x.device)
        return scale, _zeros(scale, scheme)
    mask, runs = cut(x, scheme)
    low, high = runs.amin(dim=-1), runs.amax(dim=-1)
    # NaN and infinity come through to the ends of their run; asking each element takes longer than all the rest here.
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()) and not bool(torch.isfinite(x).all()):
        raise ValueError("the tensor holds NaN or infinity and cannot be quantized; mend it or exclude it")
    scale, zero = _from_range(low, high, scheme)
    if scheme.mode == "affine":
        scale, zero = _round_zero(runs, mask, low, high, scale, zero, scheme)
    if clip != "max":
        scale, zero = _search(runs, mask, low, high, scale, zero, scheme)
        scale = _fit(runs, mask, scale, zero, scheme)
    if solver is not None:
        scale, zero = solver.refine(runs, mask, scale, zero, scheme)
    finite = torch.isfinite(scale.to(scheme.scale_dtype)).all()
    if zero is not None and scheme.mode == "shift":
        finite &= torch.isfinite(zero).all()
    if not bool(finite):
        raise ValueError(
            f"values from {float(low.min()):.3g} to {float(high.max()):.3g} need a scale or zero point that does not "
            f"fit in {scheme.scale_dtype}; use a wider scale dtype"
        )
    return scale.reshape(shape).to(scheme.scale_dtype), None if zero is None else zero.reshape(shape)


def _from_range(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale (rounded to its storage dtype, held in float32) and zero point for runs with values in [low, high]."""
    if scheme.mode == "symmetric":
        return stored(torch.maximum(low.abs(), high.abs()) / scheme.qtype.qmax, scheme), None
    top = scheme.qtype.levels - 1
    if scheme.mode == "affine":
        # The range must hold zero, else the zero point is no code.
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = stored((high - low) / top, scheme)
        return scale, (-low / scale).round_().clamp_(0, top).to(torch.uint8)
    zero = low.to(scheme.scale_dtype)
    return stored((high - zero.float()) / top, scheme), zero


def _round_zero(
    runs: Tensor, mask: Tensor | None, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """The zero point rounded up or down, with the step that then covers the range, where that has less error.

    The zero point of a range is seldom a whole number. To the nearest, both ends move by up to half a step; a little
    wider step puts one end exactly on a code, and the groups of real weights are often kinder to it.
    """
    top = scheme.qtype.levels - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    exact = -low / ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    best = squared_error(runs, mask, scale, zero, scheme)
    for rounded in (exact.floor(), exact.ceil()):
        new_zero = rounded.clamp(0, top)
        above = torch.where(new_zero < top, high / (top - new_zero).clamp(min=1), torch.zeros_like(high))
        below = torch.where(new_zero > 0, -low / new_zero.clamp(min=1), torch.zeros_like(low))
        # Where all of one side is given up for a zero point at the end, the range would not be covered.
        covers = ((new_zero < top) | (high == 0)) & ((new_zero > 0) | (low == 0))
        new_scale = stored(torch.maximum(above, below), scheme)
        new_zero = new_zero.to(torch.uint8)
        error = squared_error(runs, mask, new_scale, new_zero, scheme)
        better = covers & (error < best)
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        zero = torch.where(better, new_zero, zero)  # type: ignore[arg-type]
    return scale, zero


def _fit(runs: Tensor, mask: Tensor | None, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """The scale that fits the codes best in the least squares, found anew for the codes that it gives, where it helps."""
    if scheme.qtype.is_float or scheme.mode == "shift":
        return scale
    best = squared_error(runs, mask, scale, zero, scheme)
    for _ in range(2):
        codes = steps(runs, scale, zero, scheme)
        if mask is not None:
            codes = codes * mask
        length = codes.square().sum(dim=-1)
        fitted = (codes * runs).sum(dim=-1) / length.clamp(min=1)
        new_scale = stored(torch.where((length > 0) & (fitted > 0), fitted, scale), scheme)
        error = squared_error(runs, mask, new_scale, zero, scheme)
        scale = torch.where(error < best, new_scale, scale)
        best = torch.minimum(error, best)
    return scale


def _search(
    runs: Tensor, mask: Tensor | None, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """The candidate range with the least squared error, run by run.

    Ranges shrink towards zero, which must keep a code; a shift scheme has no such need and shrinks towards the middle.
    """
    best = squared_error(runs, mask, scale, zero, scheme)
    middle = (low + high) / 2 if scheme.mode == "shift" else torch.zeros_like(low)
    for shrink in _SHRINK:
        cut = 1.0 - shrink
        new_scale, new_zero = _from_range(low + (middle - low) * cut, high + (middle - high) * cut, scheme)
        error = squared_error(runs, mask, new_scale, new_zero, scheme)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        if zero is not None and new_zero is not None:
            zero = torch.where(better, new_zero, zero)
    return scale, zero


def _zeros(scale: Tensor, scheme: Scheme) -> Tensor | None:
    if scheme.mode == "symmetric":
        return None
    return torch.zeros_like(scale, dtype=torch.uint8 if scheme.mode == "affine" else scheme.scale_dtype)
