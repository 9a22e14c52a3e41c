"""Normalization and quantization of activations in one pass: a row of x is read once and stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.dtypes import qtype as find
from qcompile.kernels.ops.norm_quantize import check_norm
from qcompile.kernels.ops.norm_quantize import norm_quantize as reference
from qcompile.kernels.triton.target import target_of

_LONGEST = 1 << 16
_FLOAT8 = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e5m2: "e5m2", torch.float8_e4m3fnuz: "e4m3fnuz"}


@triton.jit
def _rounded(v):
    """To the nearest whole number, ties to even, for magnitudes below 2 ** 22: adding 1.5 * 2 ** 23 leaves no fraction."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def normalize(
    x, weight, bias, fixed, codes, scale, K, stride, eps, least, largest,
    NORM: tl.constexpr, FLOAT8: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of x a program. codes: ``[rows, K]``; scale: float32 ``[rows]``; BLOCK: a power of two of at least K.

    least, largest: the range of codes, with a scale of each row's own as far down as up.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < K
    y = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    if NORM == "layer":
        y = tl.where(mask, y - tl.sum(y, 0) / K, 0.0)
    if NORM != "none":
        y = y * (1.0 / tl.sqrt(tl.sum(y * y, 0) / K + eps))
    if HAS_WEIGHT:
        y *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    # a maximum may pass NaN over; a sum does not, and is 0 where there is none
    if FIXED:
        known = tl.load(fixed).to(tl.float32)
        s = known + tl.sum(tl.where(y != y, y, 0.0), 0)
        v = y / tl.where(known == 0, 1.0, known)
    else:
        amax = tl.max(tl.abs(y), 0)
        s = tl.where(amax == 0, 1.0, amax / largest) + tl.sum(y * 0.0, 0)
        v = tl.where(s - s == 0, y / s, 0.0)
    v = tl.minimum(tl.maximum(tl.where(v == v, v, 0.0), least), largest)
    if not FLOAT8:
        v = _rounded(v)
    tl.store(codes + row * K + column, v.to(codes.dtype.element_ty), mask=mask)
    tl.store(scale + row, s)


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, qtype: str, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`qcompile.kernels.ops.norm_quantize.norm_quantize`.

    The reference takes rows of more than 65536 features, and float8 that the device does not convert to.
    """
    dtype = check_norm(x, weight, bias, norm, qtype, fixed)
    features = x.shape[-1]
    kind = _FLOAT8.get(dtype)
    if features > _LONGEST or features == 0 or (kind is not None and kind not in target_of(x.device).float8):
        return reference(x, weight, bias, eps, norm, qtype, fixed)
    codes = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    flat = x.reshape(-1, features)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    if flat.shape[0] == 0:
        return codes, scale
    block, found = triton.next_power_of_2(features), find(qtype)
    normalize[(flat.shape[0],)](
        flat, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(),
        scale if fixed is None else fixed, codes, scale, features, flat.stride(0), eps,
        -found.qmax if fixed is None else found.qmin, found.qmax, NORM=norm, FLOAT8=kind is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, FIXED=fixed is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return codes, scale
