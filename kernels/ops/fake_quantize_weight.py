"""``qcompile::fake_quantize_weight``: a float weight as its codes will give it back; gradients pass straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define
from qcompile.kernels.qparams import CLIPS
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import Scheme


def fake_quantize_weight(weight: Tensor, scheme: str, clip: str) -> Tensor:
    """``dequantize(quantize(weight))``, bit for bit what a frozen weight is; one operator, so that tracers take it.

    Args:
        weight: float, arranged as a matrix (or stack of matrices), reduction axis last.
        clip: how the range is found, one of :data:`~qcompile.kernels.qparams.CLIPS`.

    Raises:
        ValueError: NaN or infinity in the weight, an unknown clip, or a scheme that does not fit the shape.
    """
    parsed = _check(weight, scheme, clip)
    return QTensor.quantize(weight, parsed, clip).dequantize(weight.dtype)  # type: ignore[arg-type]


def _check(weight: Tensor, scheme: str, clip: str) -> Scheme:
    if clip not in CLIPS:
        raise ValueError(f"unknown clip {clip!r}; allowed: {', '.join(CLIPS)}")
    parsed = Scheme.parse(scheme)
    parsed.scale_shape(weight.shape)
    return parsed


def _fake(weight: Tensor, scheme: str, clip: str) -> Tensor:
    _check(weight, scheme, clip)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    # Straight through (Bengio et al. 2013): the scale covers the range, so hardly a value is clipped.
    return grad, None, None


_SCHEMA = "fake_quantize_weight(Tensor weight, str scheme, str clip) -> Tensor"
define(_SCHEMA, fake_quantize_weight, _fake, backward=_backward)
