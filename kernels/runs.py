"""A weight as runs, the values that share a scale: how it is cut into them, and how far a scale moves each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.kernels.scheme import PerBlock, PerChannel, PerGroup, PerTensor, Scheme

#: Terms of each sum that are left when sums are laid side by side.
_SHORT = 16


def cut(x: Tensor, scheme: Scheme) -> tuple[Tensor | None, Tensor]:
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


def stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """The scale after rounding to its storage dtype, held in float32; 1 for zero, never less than the dtype can hold."""
    tiny = torch.finfo(scheme.scale_dtype).smallest_normal
    if scheme.scale_dtype == torch.float16:
        tiny = 2.0**-24  # subnormal, but a thousand times below any weight that matters
    rounded = scale.clamp(min=tiny).to(scheme.scale_dtype).float()
    return torch.where(scale == 0, torch.ones_like(rounded), rounded)


def steps(runs: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Integer codes of the runs, as float32, less the zero point where that is in code units.

    Times the scale (plus the zero point where it is in value units), they are the values that the runs get.
    """
    factor = scale.unsqueeze(-1)
    if zero is None:
        return (runs / factor).round_().clamp_(scheme.qtype.qmin, scheme.qtype.qmax)
    offset, top = zero.unsqueeze(-1).float(), scheme.qtype.levels - 1
    if scheme.mode == "affine":
        return (runs / factor).round_().add_(offset).clamp_(0, top).sub_(offset)
    return (runs - offset).div_(factor).round_().clamp_(0, top)


def values(runs: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """What the runs become: the value of the nearest code for a given scale and zero point."""
    factor = scale.unsqueeze(-1)
    if scheme.qtype.is_float:
        qtype = scheme.qtype
        return (runs / factor).clamp_(qtype.qmin, qtype.qmax).to(qtype.dtype).float().mul_(factor)
    value = steps(runs, scale, zero, scheme).mul_(factor)
    return value.add_(zero.unsqueeze(-1).float()) if zero is not None and scheme.mode == "shift" else value


def squared_error(runs: Tensor, mask: Tensor | None, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """The squared error of each run, summed over what the mask leaves; the shape of the scale."""
    error = values(runs, scale, zero, scheme).sub_(runs).square_()
    return _folded(error if mask is None else error.mul_(mask))


def _folded(terms: Tensor) -> Tensor:
    """The sum along the last axis, in place, by adding halves: an order that every device and kernel can keep.

    Of two ways to round a weight the one with less error is taken; sums in another order may choose another one.
    """
    while (length := terms.shape[-1]) > _SHORT:
        half = (length + 1) // 2
        terms[..., : length - half] += terms[..., half:]
        terms = terms[..., :half]
    # What is left lies better the other way round: a loop over so few costs more than what it adds.
    terms = terms.movedim(-1, 0).contiguous()
    while (length := len(terms)) > 1:
        half = (length + 1) // 2
        terms[: length - half] += terms[half:]
        terms = terms[:half]
    return terms[0]


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
