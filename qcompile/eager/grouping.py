"""Quanto's axes and groups in terms of a scheme: which elements of a weight share a scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.kernels.dtypes import QType
from qcompile.kernels.scheme import Mode, PerChannel, PerTensor, Scheme


def check_axis(axis: int | None, base: Tensor, allowed: Sequence[int | None]) -> None:
    """Raise unless ``axis`` is one of those allowed and ``base`` a floating point tensor that has it.

    Raises:
        TypeError: ``base`` is not a floating point tensor.
        ValueError: another axis, or a scalar where an axis is named.
    """
    if not isinstance(base, Tensor) or not base.is_floating_point():
        given = base.dtype if isinstance(base, Tensor) else type(base).__name__
        raise TypeError(f"only floating point tensors can be quantized, got {given}")
    if isinstance(axis, bool) or axis not in allowed:
        names = {None: "None (one scale for all)", 0: "0 (first axis)", -1: "-1 (last axis)"}
        raise ValueError(f"axis must be {' or '.join(names[a] for a in allowed)}, got {axis!r}")
    if axis is not None and base.dim() == 0:
        raise ValueError(f"axis {axis} needs a tensor of at least one axis, got a scalar")


def group_count(shape: Sequence[int], axis: int, group_size: int) -> int:
    """How many groups an index of ``axis`` has.

    Raises:
        ValueError: the group size is not a positive whole number that divides what an index of the axis holds.
    """
    per_index = math.prod(shape) // shape[axis] if shape and shape[axis] else 0
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a whole number of at least 1, got {group_size!r}")
    if not per_index or per_index % group_size:
        raise ValueError(
            f"group_size must divide the {per_index} elements of each index of axis {axis} of shape {list(shape)}, "
            f"got {group_size}"
        )
    return per_index // group_size


def grouped(base: Tensor, axis: int, group_size: int) -> Tensor:
    """``base`` with one group a row (axis 0: ``[groups, group_size]``) or a column (axis -1: ``[group_size, groups]``).

    Groups of one index stand together.
    """
    count = group_count(base.shape, axis, group_size)
    if axis == 0:
        return base.reshape(-1, group_size)
    return base.reshape(count, group_size, base.shape[-1]).permute(1, 2, 0).reshape(group_size, -1)


def by_index(base: Tensor, axis: int) -> Tensor:
    """``base`` as a matrix whose rows are the indices of ``axis``, 0 or -1."""
    return base.reshape(base.shape[0], -1) if axis == 0 else base.reshape(-1, base.shape[-1]).t()


def scheme_of(dtype: QType, axis: int | None, mode: Mode, scale_dtype: torch.dtype = torch.float32) -> Scheme:
    """The scheme with one scale in all (``axis`` None) or one for each index of ``axis``."""
    return Scheme(dtype, PerTensor() if axis is None else PerChannel(axis), mode, scale_dtype)
