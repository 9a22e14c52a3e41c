"""``qcompile::norm_quantize``: RMSNorm or LayerNorm, and the codes of its result with one scale a token, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.dtypes import qtype as find
from qcompile.kernels.ops._library import define, no_gradient

_OP = "qcompile::norm_quantize"
NORMS = ("rms", "layer")


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, qtype: str) -> torch.dtype:
    """The dtype of the codes. Raises ValueError or TypeError on arguments that do not fit."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{_OP}: x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x must be [..., features], got a scalar")
    if norm not in NORMS:
        raise ValueError(f"{_OP}: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and (part.dim() != 1 or part.shape[0] != x.shape[-1]):
            raise ValueError(f"{_OP}: {name} must be [{x.shape[-1]}], got {list(part.shape)}")
    found = find(qtype)
    if found.bits != 8:
        raise ValueError(f"{_OP}: activations are quantized to 8 bits, got {qtype!r}")
    return found.dtype


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, qtype: str
) -> tuple[Tensor, Tensor]:
    """Codes ``[..., features]`` and scale float32 ``[..., 1]`` of the normalized x; arithmetic is float32 throughout.

    Args:
        norm: ``rms`` (``x / sqrt(mean(x^2) + eps)``) or ``layer``; both times weight, plus bias, where given.
        qtype: ``qint8`` or a float8. A token's largest magnitude becomes the largest code; one of zeros has scale 1.

    NaN and infinity make their token's scale, and so its dequantized values, non-finite.
    """
    dtype = check_norm(x, weight, bias, norm, qtype)
    y = x.float()
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    largest = find(qtype).qmax
    amax = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros((*y.shape[:-1], 1))
    scale = torch.where(amax == 0, 1.0, amax / largest)
    codes = (torch.nan_to_num(y) / scale).clamp(-largest, largest)
    codes = torch.nan_to_num(codes)
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, qtype: str
) -> tuple[Tensor, Tensor]:
    dtype = check_norm(x, weight, bias, norm, qtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


define(
    "norm_quantize(Tensor x, Tensor? weight, Tensor? bias, float eps, str norm, str qtype) -> (Tensor, Tensor)",
    norm_quantize,
    _fake,
    backward=no_gradient("norm_quantize", "codes are integers; run the float model where activations need gradients"),
)
