"""Between a logical weight and a layout: scale and zero point as ``[rows, groups]``, and back. What every layout needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.kernels.scheme import PerBlock, PerChannel, PerGroup, PerTensor, Scheme

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def container(bits: int, containers: Sequence[int]) -> int:
    """How many bits a code of ``bits`` bits takes in a layout that stores codes in one of ``containers`` (ascending)."""
    return next(size for size in containers if size >= bits)


def refuses_matrix(scheme: Scheme, shape: Sequence[int], dtype: torch.dtype, floats: bool = False) -> str | None:
    """Why a kernel for a matrix of integer codes with scales that follow its rows cannot take this; None if it can.

    ``floats``: it takes float8 codes, too.
    """
    if scheme.qtype.is_float and not floats:
        return f"takes integer codes, not {scheme.qtype}"
    if len(shape) != 2 or min(shape) < 1:
        return f"takes a matrix, not shape {list(shape)}"
    if isinstance(scheme.granularity, PerChannel) and scheme.granularity.axis not in (0, -2):
        return f"scales must follow rows, not axis {scheme.granularity.axis}"
    if dtype not in _FLOATS:
        return f"takes float32, float16 or bfloat16 activations, not {str(dtype).removeprefix('torch.')}"
    return None


def check_parts(scale: Tensor, zero: Tensor | None) -> None:
    """Raise ValueError unless a scale is float and its zero point, uint8 or a shift, goes with it."""
    if scale.dtype not in _FLOATS:
        raise ValueError(f"scale must be float32, float16 or bfloat16, got {scale.dtype}")
    if zero is not None:
        if zero.shape != scale.shape:
            raise ValueError(f"zero must have the shape of scale {list(scale.shape)}, got {list(zero.shape)}")
        if zero.dtype not in (torch.uint8, scale.dtype):
            raise ValueError(f"zero must be uint8 (code units) or {scale.dtype} like scale (a shift), got {zero.dtype}")


def group_size(scheme: Scheme, columns: int) -> int:
    """Columns that share a scale; 0 where all of a row do."""
    size = {PerGroup: "size", PerBlock: "cols"}.get(type(scheme.granularity))
    value = getattr(scheme.granularity, size) if size else columns
    return 0 if value >= columns else value


def by_rows(part: Tensor, scheme: Scheme, shape: Sequence[int]) -> Tensor:
    """A scale or zero point as ``[rows, groups]``."""
    match scheme.granularity:
        case PerTensor():
            return part.reshape(1, 1).expand(shape[0], 1).contiguous()
        case PerChannel():
            return part.reshape(shape[0], 1)
        case PerBlock(rows=rows):
            return part.repeat_interleave(rows, dim=0)[: shape[0]].contiguous()
        case PerGroup():
            return part
    raise TypeError(f"unknown granularity {scheme.granularity!r}")


def zero_by_rows(zero: Tensor | None, scale: Tensor, scheme: Scheme, shape: Sequence[int], bits: int) -> Tensor | None:
    """The zero point as ``[rows, groups]``, for a container of ``bits`` bits and the scale that :func:`by_rows` gave."""
    if zero is not None:
        return by_rows(zero, scheme, shape)
    if bits != scheme.qtype.bits:
        # In a wider container the kernel's own symmetric zero point would be another one.
        return torch.full_like(scale, scheme.qtype.offset, dtype=torch.uint8)
    return None


def stored(part: Tensor, scheme: Scheme, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`by_rows`."""
    if isinstance(scheme.granularity, PerBlock):
        part = part[:: scheme.granularity.rows]
    if isinstance(scheme.granularity, PerTensor):
        part = part[:1]
    return part.reshape(scheme.scale_shape(tuple(shape))).contiguous()


def signed(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes as :func:`~qcompile.kernels.numerics.store` takes them, from the unsigned ones of a layout."""
    return (codes.to(torch.int16) - scheme.qtype.offset).to(torch.int8) if scheme.mode == "symmetric" else codes
