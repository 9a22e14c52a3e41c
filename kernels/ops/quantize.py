"""``qcompile::quantize`` and ``qcompile::quantize_dynamic``: float in, codes out (activations; weights use QTensor)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import numerics
from qcompile.kernels.ops._library import define
from qcompile.kernels.scheme import Scheme


def _unpacked(scheme_text: str) -> Scheme:
    scheme = Scheme.parse(scheme_text)
    if scheme.packed_bits:
        raise ValueError(f"activations are quantized to 8 bits, got scheme {scheme_text}")
    return scheme


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: str) -> Tensor:
    """Codes of ``x`` for a scale known beforehand (static activations); the shape of ``x``, ``Scheme.code_dtype``."""
    return numerics.encode(x, scale, zero, _unpacked(scheme))


def _quantize_fake(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: str) -> Tensor:
    return torch.empty_like(x, dtype=_unpacked(scheme).code_dtype)


def quantize_dynamic(x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Codes and scale of ``x`` with the scale taken from ``x`` itself, symmetric; ``group=K`` means one a token.

    NaN and infinity are not hidden: they make their group's scale, and so its dequantized values, non-finite.
    """
    parsed = _unpacked(scheme)
    if parsed.mode != "symmetric":
        raise ValueError(f"dynamic quantization is symmetric, got scheme {scheme}")
    scale = _dynamic_scale(x, parsed)
    return numerics.encode(torch.nan_to_num(x), scale, None, parsed), scale


def _dynamic_scale(x: Tensor, scheme: Scheme) -> Tensor:
    size = getattr(scheme.granularity, "size", None)
    if size is None:
        raise ValueError(f"dynamic quantization takes group granularity, got scheme {scheme}")
    missing = -x.shape[-1] % size
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    amax = padded.float().unflatten(-1, (padded.shape[-1] // size, size)).abs().amax(dim=-1)
    scale = (amax / scheme.qtype.qmax).to(scheme.scale_dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _quantize_dynamic_fake(x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    parsed = _unpacked(scheme)
    return (
        torch.empty_like(x, dtype=parsed.code_dtype, memory_format=torch.contiguous_format),
        x.new_empty(parsed.scale_shape(x.shape), dtype=parsed.scale_dtype),
    )


define("quantize(Tensor x, Tensor scale, Tensor? zero, str scheme) -> Tensor", quantize, _quantize_fake)
define("quantize_dynamic(Tensor x, str scheme) -> (Tensor, Tensor)", quantize_dynamic, _quantize_dynamic_fake)
