"""Choosing scale and zero point of a weight from its values: max-abs, min-max, and an MSE-optimal clip.

Each function sees the weight as rows of runs: ``[runs, length]``, one run for each scale. Results are rounded to the
scale's storage dtype *before* the codes are computed, so that a code is always the nearest for the stored scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qcompile.kernels.scheme import PerBlock, PerChannel, PerGroup, PerTensor, Scheme

Clip: TypeAlias = Literal["max", "mse"]
CLIPS: tuple[Clip, ...] = ("max", "mse")

#: Fractions of the full range that the MSE search tries, largest first.
_SHRINK = tuple(1.0 - 0.03 * i for i in range(20))


def choose(x: Tensor, scheme: Scheme, clip: Clip = "max") -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for ``x``.

    An all-zero run gets scale 1, so that it decodes to exact zeros. A scale too small for its storage dtype becomes the
    smallest one that dtype has.

    Args:
        x: float tensor, any shape that fits the scheme's granularity.
        clip: ``"max"`` covers the full range, with the zero point rounded to the side that serves the values better;
            ``"mse"`` shrinks it to where the squared error is least (20 candidates), then fits the scale to the codes.

    Returns:
        ``(scale, zero)``, both of shape ``scheme.scale_shape(x.shape)``; zero is None for a symmetric scheme.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: NaN or infinity in ``x``, an unknown ``clip``, or a scale too large for the scale dtype.
    """
    if not x.is_floating_point():
        raise TypeError(f"only floating point tensors can be quantized, got {x.dtype}")
    if clip not in CLIPS:
        raise ValueError(f"unknown clip {clip!r}; allowed: {', '.join(CLIPS)}")
    shape = scheme.scale_shape(x.shape)
    if x.numel() == 0:
        scale = torch.ones(shape, dtype=scheme.scale_dtype, device=x.device)
        return scale, _zeros(scale, scheme)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the tensor holds NaN or infinity and cannot be quantized; mend it or exclude it")
    mask, runs = _runs(x, scheme)
    low, high = runs.amin(dim=-1), runs.amax(dim=-1)
    scale, zero = _from_range(low, high, scheme)
    if scheme.mode == "affine":
        scale, zero = _round_zero(runs, mask, low, high, scale, zero, scheme)
    if clip == "mse":
        scale, zero = _search(runs, mask, low, high, scale, zero, scheme)
        scale = _fit(runs, mask, scale, zero, scheme)
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
        return _stored(torch.maximum(low.abs(), high.abs()) / scheme.qtype.qmax, scheme), None
    top = scheme.qtype.levels - 1
    if scheme.mode == "affine":
        # The range must hold zero, else the zero point is no code.
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _stored((high - low) / top, scheme)
        return scale, (-low / scale).round_().clamp_(0, top).to(torch.uint8)
    zero = low.to(scheme.scale_dtype)
    return _stored((high - zero.float()) / top, scheme), zero


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
    best = _squared_error(runs, mask, scale, zero, scheme)
    for rounded in (exact.floor(), exact.ceil()):
        new_zero = rounded.clamp(0, top)
        above = torch.where(new_zero < top, high / (top - new_zero).clamp(min=1), torch.zeros_like(high))
        below = torch.where(new_zero > 0, -low / new_zero.clamp(min=1), torch.zeros_like(low))
        # Where all of one side is given up for a zero point at the end, the range would not be covered.
        covers = ((new_zero < top) | (high == 0)) & ((new_zero > 0) | (low == 0))
        new_scale = _stored(torch.maximum(above, below), scheme)
        new_zero = new_zero.to(torch.uint8)
        error = _squared_error(runs, mask, new_scale, new_zero, scheme)
        better = covers & (error < best)
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        zero = torch.where(better, new_zero, zero)  # type: ignore[arg-type]
    return scale, zero


def _fit(runs: Tensor, mask: Tensor | None, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """The scale that fits the codes best in the least squares, found anew for the codes that it gives, where it helps."""
    if scheme.qtype.is_float or scheme.mode == "shift":
        return scale
    offset = 0.0 if zero is None else zero.unsqueeze(-1).float()
    least, most = (scheme.qtype.qmin, scheme.qtype.qmax) if zero is None else (0, scheme.qtype.levels - 1)
    best = _squared_error(runs, mask, scale, zero, scheme)
    for _ in range(2):
        steps = ((runs / scale.unsqueeze(-1)).round_() + offset).clamp_(least, most) - offset
        if mask is not None:
            steps = steps * mask
        length = steps.square().sum(dim=-1)
        fitted = (steps * runs).sum(dim=-1) / length.clamp(min=1)
        new_scale = _stored(torch.where((length > 0) & (fitted > 0), fitted, scale), scheme)
        error = _squared_error(runs, mask, new_scale, zero, scheme)
        scale = torch.where(error < best, new_scale, scale)
        best = torch.minimum(error, best)
    return scale


def _stored(scale: Tensor, scheme: Scheme) -> Tensor:
    tiny = torch.finfo(scheme.scale_dtype).smallest_normal
    if scheme.scale_dtype == torch.float16:
        tiny = 2.0**-24  # subnormal, but a thousand times below any weight that matters
    rounded = scale.clamp(min=tiny).to(scheme.scale_dtype).float()
    return torch.where(scale == 0, torch.ones_like(rounded), rounded)


def _search(
    runs: Tensor, mask: Tensor | None, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """The candidate range with the least squared error, run by run.

    Ranges shrink towards zero, which must keep a code; a shift scheme has no such need and shrinks towards the middle.
    """
    best = _squared_error(runs, mask, scale, zero, scheme)
    middle = (low + high) / 2 if scheme.mode == "shift" else torch.zeros_like(low)
    for shrink in _SHRINK:
        cut = 1.0 - shrink
        new_scale, new_zero = _from_range(low + (middle - low) * cut, high + (middle - high) * cut, scheme)
        error = _squared_error(runs, mask, new_scale, new_zero, scheme)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        if zero is not None and new_zero is not None:
            zero = torch.where(better, new_zero, zero)
    return scale, zero


def _squared_error(runs: Tensor, mask: Tensor | None, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    factor = scale.unsqueeze(-1)
    if scheme.qtype.is_float:
        qtype = scheme.qtype
        value = (runs / factor).clamp_(qtype.qmin, qtype.qmax).to(qtype.dtype).float() * factor
    elif zero is None:
        value = (runs / factor).round_().clamp_(scheme.qtype.qmin, scheme.qtype.qmax) * factor
    else:
        offset, top = zero.unsqueeze(-1).float(), scheme.qtype.levels - 1
        if scheme.mode == "affine":
            value = (((runs / factor).round_() + offset).clamp_(0, top) - offset) * factor
        else:
            value = ((runs - offset) / factor).round_().clamp_(0, top) * factor + offset
    error = (value - runs).square_()
    return (error if mask is None else error * mask).sum(dim=-1)


def _runs(x: Tensor, scheme: Scheme) -> tuple[Tensor | None, Tensor]:
    """``x`` in float32 as ``[..., runs, length]``, one run for each scale, and a mask of what is not padding.

    Padding repeats an element of its own run, so that it changes neither minimum nor maximum.
    """
    x = x.float()
    match scheme.granularity:
        case PerTensor():
            return None, x.reshape(1, -1)
        case PerChannel(axis=axis):
            return None, x.movedim(axis, 0).reshape(x.shape[axis], -1)
        case PerGroup(size=size):
            return _split(x, min(size, x.shape[-1]))
        case PerBlock(rows=rows, cols=cols):
            rows, cols = min(rows, x.shape[-2]), min(cols, x.shape[-1])
            filled = _fill(_fill(x, -1, cols), -2, rows)
            blocks = filled.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows)).transpose(-3, -2)
            if filled.shape == x.shape:
                return None, blocks.flatten(-2)
            mask = torch.zeros_like(filled)
            mask[..., : x.shape[-2], : x.shape[-1]] = 1
            mask = mask.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows)).transpose(-3, -2)
            return mask.flatten(-2), blocks.flatten(-2)
    raise TypeError(f"unknown granularity {scheme.granularity!r}")


def _split(x: Tensor, size: int) -> tuple[Tensor | None, Tensor]:
    filled = _fill(x, -1, size)
    runs = filled.unflatten(-1, (-1, size))
    if filled.shape == x.shape:
        return None, runs
    mask = torch.ones_like(filled)
    mask[..., x.shape[-1] :] = 0
    return mask.unflatten(-1, (-1, size)), runs


def _fill(x: Tensor, axis: int, size: int) -> Tensor:
    """Pad ``axis`` to a multiple of ``size`` with its last element, which lies in the run that is short."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    sizes: Sequence[int] = [missing if i == axis % x.dim() else -1 for i in range(x.dim())]
    return torch.cat([x, x.narrow(axis, x.shape[axis] - 1, 1).expand(*sizes)], dim=axis)


def _zeros(scale: Tensor, scheme: Scheme) -> Tensor | None:
    if scheme.mode == "symmetric":
        return None
    return torch.zeros_like(scale, dtype=torch.uint8 if scheme.mode == "affine" else scheme.scale_dtype)
