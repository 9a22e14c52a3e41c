"""``qcompile::quantize`` and ``qcompile::quantize_dynamic``: float in, codes out (activations; weights use QTensor)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import numerics
from qcompile.kernels.ops._library import define, no_gradient
from qcompile.kernels.qtensor import check_qparams
from qcompile.kernels.scheme import PerGroup, Scheme


def _unpacked(scheme_text: str) -> Scheme:
    scheme = Scheme.parse(scheme_text)
    if scheme.packed_bits:
        raise ValueError(f"activations are quantized to 8 bits, got scheme {scheme_text}")
    return scheme


def _static(x: Tensor, scale: Tensor, zero: Tensor | None, scheme_text: str) -> Scheme:
    scheme = _unpacked(scheme_text)
    _check_float(x)
    check_qparams(scale, zero, scheme, x.shape)
    return scheme


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point() or x.element_size() == 1:
        raise TypeError(f"x must be a float tensor, got {x.dtype}")


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: str) -> Tensor:
    """Codes of ``x`` for a scale known beforehand (static activations); the shape of ``x``, ``Scheme.code_dtype``.

    Values out of range saturate. NaN stays NaN in a float8; an integer has none, there it gives an arbitrary code.
    """
    return numerics.encode(x, scale, zero, _static(x, scale, zero, scheme)).contiguous()


def _quantize_fake(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: str) -> Tensor:
    dtype = _static(x, scale, zero, scheme).code_dtype
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def quantize_dynamic(x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Codes and scale of ``x`` with the scale taken from ``x`` itself, symmetric; ``group=K`` means one a token.

    NaN and infinity are not hidden: they make their group's scale, and so its dequantized values, non-finite.
    """
    parsed = _unpacked(scheme)
    scale = _dynamic_scale(x, parsed)
    return numerics.encode(torch.nan_to_num(x), scale, None, parsed).contiguous(), scale


def _dynamic_scale(x: Tensor, scheme: Scheme) -> Tensor:
    size = max(1, min(_group(x, scheme), x.shape[-1]))
    missing = -x.shape[-1] % size
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    amax = padded.float().unflatten(-1, (padded.shape[-1] // size, size)).abs().amax(dim=-1)
    scale = (amax / scheme.qtype.qmax).to(scheme.scale_dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _group(x: Tensor, scheme: Scheme) -> int:
    if scheme.mode != "symmetric":
        raise ValueError(f"dynamic quantization is symmetric, got scheme {scheme}")
    if not isinstance(scheme.granularity, PerGroup):
        raise ValueError(f"dynamic quantization takes group granularity, got scheme {scheme}")
    _check_float(x)
    scheme.scale_shape(x.shape)
    return scheme.granularity.size


def _quantize_dynamic_fake(x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    parsed = _unpacked(scheme)
    _group(x, parsed)
    return (
        torch.empty_like(x, dtype=parsed.code_dtype, memory_format=torch.contiguous_format),
        x.new_empty(parsed.scale_shape(x.shape), dtype=parsed.scale_dtype),
    )


_REASON = "codes are integers; run the float model where activations need gradients"
define(
    "quantize(Tensor x, Tensor scale, Tensor? zero, str scheme) -> Tensor",
    quantize,
    _quantize_fake,
    backward=no_gradient("quantize", _REASON),
)
define(
    "quantize_dynamic(Tensor x, str scheme) -> (Tensor, Tensor)",
    quantize_dynamic,
    _quantize_dynamic_fake,
    backward=no_gradient("quantize_dynamic", _REASON),
)
