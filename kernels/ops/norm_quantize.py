"""``qcompile::norm_quantize``: activations, normalized first where a norm precedes, in codes with a scale for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.dtypes import qtype as find
from qcompile.kernels.ops._library import define, no_gradient

_OP = "qcompile::norm_quantize"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NORMS = ("none", "rms", "layer")


def check_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, qtype: str, fixed: Tensor | None
) -> torch.dtype:
    """The dtype of the codes. Raises ValueError or TypeError on arguments that do not fit."""
    if x.dtype not in _FLOATS:
        raise TypeError(f"{_OP}: x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x must be [..., features], got a scalar")
    if norm not in NORMS:
        raise ValueError(f"{_OP}: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and (part.dim() != 1 or part.shape[0] != x.shape[-1]):
            raise ValueError(f"{_OP}: {name} must be [{x.shape[-1]}], got {list(part.shape)}")
    if fixed is not None and (fixed.dim() != 0 or fixed.dtype not in _FLOATS):
        raise ValueError(f"{_OP}: fixed must be one float number (a 0-dim tensor), got {fixed.dtype} {list(fixed.shape)}")
    found = find(qtype)
    if found.bits != 8:
        raise ValueError(f"{_OP}: activations are quantized to 8 bits, got {qtype!r}")
    return found.dtype


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, qtype: str, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes ``[..., features]`` and scale float32 ``[..., 1]`` of the normalized x; arithmetic is float32 throughout.

    Args:
        norm: ``rms`` (``x / sqrt(mean(x^2) + eps)``), ``layer``, or ``none``; times weight, plus bias, where given.
        qtype: ``qint8`` or a float8.
        fixed: a scale that is known beforehand, for all tokens; what is out of its range saturates, infinity too. None: a
            token's largest magnitude becomes the largest code; one of zeros has scale 1, one with infinity has infinity.

    NaN makes its token's scale, and so its dequantized values, NaN.
    """
    dtype = check_norm(x, weight, bias, norm, qtype, fixed)
    y = x.float()
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm != "none":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    kind = find(qtype)
    if fixed is None:
        amax = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros((*y.shape[:-1], 1))
        scale = torch.where(amax == 0, 1.0, amax / kind.qmax)
        codes = (torch.nan_to_num(y) / scale).clamp(-kind.qmax, kind.qmax)
    else:
        scale = torch.where(y.isnan().any(-1, keepdim=True), float("nan"), fixed.float())
        codes = (y / torch.where(fixed == 0, 1.0, fixed.float())).clamp(kind.qmin, kind.qmax)
    codes = torch.nan_to_num(codes)
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, qtype: str, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dtype = check_norm(x, weight, bias, norm, qtype, fixed)
    codes = x.new_empty(x.shape, dtype=dtype)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


define(
    "norm_quantize(Tensor x, Tensor? weight, Tensor? bias, float eps, str norm, str qtype, Tensor? fixed=None) "
    "-> (Tensor, Tensor)",
    norm_quantize,
    _fake,
    backward=no_gradient("norm_quantize", "codes are integers; run the float model where activations need gradients"),
)
