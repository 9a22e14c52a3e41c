"""From float to codes and back, in plain torch: the definition that every kernel is held against.

All arithmetic is in float32 (float64 where a float64 result is asked for), whatever the dtypes of input and scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.kernels.bits import pack_bits, unpack_bits
from qcompile.kernels.scheme import PerBlock, PerChannel, PerGroup, PerTensor, Scheme


def spread(scale: Tensor, scheme: Scheme, shape: Sequence[int]) -> Tensor:
    """A scale (or zero point) in a form that broadcasts against a tensor of ``shape``."""
    match scheme.granularity:
        case PerTensor():
            return scale
        case PerChannel(axis=axis):
            view = [1] * len(shape)
            view[axis] = shape[axis]
            return scale.reshape(view)
        case PerGroup(size=size):
            return _repeat(scale, -1, size, shape[-1])
        case PerBlock(rows=rows, cols=cols):
            return _repeat(_repeat(scale, -1, cols, shape[-1]), -2, rows, shape[-2])
    raise TypeError(f"unknown granularity {scheme.granularity!r}")


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes of ``x`` for a given scale and zero point, unpacked, in :attr:`Scheme.code_dtype`.

    Rounds half to even; values out of range saturate.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, factor = x.to(work), spread(scale, scheme, x.shape).to(work)
    if scheme.qtype.is_float:
        return (wide / factor).clamp(scheme.qtype.qmin, scheme.qtype.qmax).to(scheme.qtype.dtype)
    if scheme.mode == "symmetric":
        return (wide / factor).round_().clamp_(scheme.qtype.qmin, scheme.qtype.qmax).to(torch.int8)
    offset = spread(_required(zero, scheme), scheme, x.shape).to(work)
    top = scheme.qtype.levels - 1
    if scheme.mode == "affine":
        return (wide / factor).round_().add_(offset).clamp_(0, top).to(torch.uint8)
    return (wide - offset).div_(factor).round_().clamp_(0, top).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The float value of unpacked codes, in ``dtype``."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    value, factor = codes.to(work), spread(scale, scheme, codes.shape).to(work)
    if scheme.mode == "symmetric":
        return (value * factor).to(dtype)
    offset = spread(_required(zero, scheme), scheme, codes.shape).to(work)
    if scheme.mode == "affine":
        return ((value - offset) * factor).to(dtype)
    return (value * factor + offset).to(dtype)


def store(codes: Tensor, scheme: Scheme) -> Tensor:
    """Unpacked codes as they are kept, contiguous: offset binary and bit-packed below 8 bits, else unchanged."""
    if not scheme.packed_bits:
        return codes.contiguous()
    if scheme.mode == "symmetric":
        codes = codes.to(torch.int8).view(torch.uint8) + scheme.qtype.offset  # which wraps, as int8 does
    return pack_bits(codes, scheme.qtype.bits)


def fetch(data: Tensor, scheme: Scheme, shape: Sequence[int]) -> Tensor:
    """Unpacked codes from their stored form; the exact inverse of :func:`store`."""
    if not scheme.packed_bits:
        return data
    codes = unpack_bits(data, scheme.qtype.bits, shape[-1])
    if scheme.mode == "symmetric":
        return (codes.to(torch.int8) - scheme.qtype.offset).to(torch.int8)
    return codes


def _repeat(scale: Tensor, axis: int, size: int, length: int) -> Tensor:
    """Each element of ``axis`` (counted from the end) ``size`` times, cut off at ``length``, in ops Inductor fuses."""
    count, size = scale.shape[axis], min(size, length)
    if count * size != length:
        # The last run is short. Cutting a repeated axis off is what Inductor 2.13 miscompiles on the CPU (it reads past
        # the scales where the codes are bytes); a lookup it gets right.
        return scale.index_select(axis, torch.arange(length, device=scale.device) // size)
    wide = scale.unflatten(axis, (count, 1))
    sizes = list(wide.shape)
    # unflatten put the new axis right after `axis`; counted from the end it stands where `axis` stood.
    sizes[axis] = size
    return wide.expand(sizes).flatten(axis - 1, axis)


def _required(zero: Tensor | None, scheme: Scheme) -> Tensor:
    if zero is None:
        raise ValueError(f"scheme {scheme} needs a zero point, got None")
    return zero
