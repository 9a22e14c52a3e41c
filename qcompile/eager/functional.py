"""Quantizing single tensors, with the names and arguments of Hugging Face Quanto."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.eager.grouping import check_axis
from qcompile.eager.optimizers import AbsmaxOptimizer, AffineOptimizer, Optimizer, optimizer_named
from qcompile.kernels import dtypes
from qcompile.kernels.dtypes import QType, qint8
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import SCALE_DTYPES, Granularity, Mode, PerBlock, PerChannel, PerGroup, PerTensor, Scheme

__all__ = ["absmax_scale", "quantize_activation", "quantize_weight"]


def absmax_scale(base: Tensor, qtype: QType | str = qint8, axis: int | None = None) -> Tensor:
    """The scale that maps the largest absolute value onto the highest code.

    Args:
        base: float tensor.
        qtype: quantized dtype, an object or a name.
        axis: None: one scale for all, a scalar; 0 or -1: one for each index of the first or last axis, of the shape of
            ``base`` with every other axis of size 1.

    Returns:
        The scale in the dtype of ``base``; 1 where all values are zero.

    Raises:
        ValueError: an unknown dtype, another axis, or NaN or infinity in ``base``.
        TypeError: not a floating point tensor.
    """
    return AbsmaxOptimizer()(base, qtype, axis)


def quantize_weight(
    t: Tensor,
    qtype: QType | str,
    axis: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    group_size: int | None = None,
    *,
    optimizer: str | Optimizer | None = None,
    zeropoint: bool = False,
) -> QTensor:
    """Quantize a weight for a scale (and shift) that are given, or that an optimizer finds.

    Args:
        t: float weight; with groups of ``axis`` -1, a matrix.
        qtype: quantized dtype, an object or a name.
        axis: 0 or -1: the axis whose indices have scales of their own.
        scale: one a run, in any shape with that many elements, the groups of an index together; its dtype is kept.
        shift: like the scale. Floating point: a value is ``scale * code - shift``; uint8: ``scale * (code - shift)``. None
            with a scale: symmetric codes.
        group_size: elements along the other axis that share a scale (the last group may be short); None: all.
        optimizer: a name or an object, where no scale is given. None: the largest absolute value at 8 bits, else min-max.
        zeropoint: with an optimizer, below 8 bits: the shift is a code (uint8), so that zero is exact.

    Returns:
        The quantized weight, of the shape of ``t``.

    Raises:
        ValueError: an unknown dtype, another axis, a group size below 1, a scale or shift that does not fit, a shift without
            a scale or for a float8 dtype, or both a scale and an optimizer.
        TypeError: ``t`` is not a floating point tensor.

    Example:
        >>> w = torch.randn(64, 128)
        >>> quantize_weight(w, "qint4", group_size=32, optimizer="hqq").scheme.mode
        'shift'
    """
    dtype = dtypes.qtype(qtype)
    check_axis(axis, t, (0, -1))
    if scale is None:
        if shift is not None:
            raise ValueError("a shift without a scale says nothing; give both, or neither")
        found = AbsmaxOptimizer() if dtype.bits == 8 else optimizer_named("max")
        found = found if optimizer is None else optimizer_named(optimizer)
        mode: Mode = "symmetric"
        if not dtype.is_float and (dtype.bits < 8 or _affine_only(found)):
            mode = "affine" if zeropoint else "shift"
        scale_dtype = t.dtype if t.dtype in SCALE_DTYPES.values() else torch.float32
        return QTensor.quantize(t, Scheme(dtype, _runs(t, axis, group_size), mode, scale_dtype), found)
    if optimizer is not None:
        raise ValueError("give a scale or an optimizer, not both")
    if shift is None:
        mode = "symmetric"
    elif dtype.is_float:
        raise ValueError(f"shift cannot be given for {dtype}: its codes are signed")
    else:
        mode = "shift" if shift.is_floating_point() else "affine"
    scheme = Scheme(dtype, _runs(t, axis, group_size), mode, scale.dtype)
    scale = _shaped("scale", scale, t, axis, scheme)
    return QTensor.from_qparams(t, scale, _zero(shift, t, axis, scheme), scheme)


def quantize_activation(t: Tensor, qtype: QType | str, scale: Tensor) -> QTensor:
    """Quantize an activation to signed codes of 8 bits with one scale, saturating.

    Args:
        t: float tensor of any shape.
        qtype: ``qint8`` or a float8 dtype, an object or a name.
        scale: one element, float32, float16 or bfloat16.

    Raises:
        ValueError: another dtype, or a scale of more than one element, of another dtype, or not above zero.
        TypeError: ``t`` is not a floating point tensor.
    """
    dtype = dtypes.qtype(qtype)
    if dtype.bits != 8:
        eight = ", ".join(name for name, each in dtypes.qtypes.items() if each.bits == 8)
        raise ValueError(f"activations take dtypes of 8 bits ({eight}), got {dtype}")
    if scale.numel() != 1:
        raise ValueError(f"an activation has one scale for all of it, got a scale of shape {list(scale.shape)}")
    return QTensor.from_qparams(t, scale.reshape(()), None, Scheme(dtype, PerTensor(), "symmetric", scale.dtype))


def _affine_only(optimizer: Optimizer) -> bool:
    """Whether an optimizer gives a shift at 8 bits too: only a user's own, which has no other way."""
    return isinstance(optimizer, AffineOptimizer) and type(optimizer).qparams is AffineOptimizer.qparams


def _runs(t: Tensor, axis: int, group_size: int | None) -> Granularity:
    if group_size is None:
        return PerChannel(axis)
    if axis == 0:
        if t.dim() > 2 and (isinstance(group_size, int) and t.shape[-1] % max(group_size, 1)):
            raise ValueError(
                f"groups of {group_size} would run over the last axis of shape {list(t.shape)}; reshape the weight to a "
                f"matrix"
            )
        return PerGroup(group_size)
    if t.dim() != 2:
        raise ValueError(f"groups of axis -1 need a matrix, got shape {list(t.shape)}")
    return PerBlock(group_size, 1)


def _shaped(name: str, given: Tensor, t: Tensor, axis: int, scheme: Scheme) -> Tensor:
    shape = scheme.scale_shape(t.shape)
    if tuple(given.shape) == shape:
        return given
    count = 1
    for size in shape:
        count *= size
    if given.numel() != count:
        raise ValueError(f"{name} must have {count} elements for shape {list(t.shape)} in {scheme}, got {list(given.shape)}")
    # Groups of one index stand together; in blocks they stand below each other.
    return given.reshape(shape[::-1]).t() if axis == -1 and len(shape) == 2 else given.reshape(shape)


def _zero(shift: Tensor | None, t: Tensor, axis: int, scheme: Scheme) -> Tensor | None:
    if shift is None:
        return None
    shift = _shaped("shift", shift, t, axis, scheme)
    if scheme.mode == "shift":
        return -shift.to(scheme.scale_dtype)
    if shift.dtype == torch.bool or bool(((shift < 0) | (shift >= scheme.qtype.levels)).any()):
        raise ValueError(f"an integer shift is a code of {scheme.qtype}, from 0 to {scheme.qtype.levels - 1}")
    return shift.to(torch.uint8)
