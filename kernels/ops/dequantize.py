"""``qcompile::dequantize``: stored codes in, float value out. With it alone any quantized graph runs on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import numerics
from qcompile.kernels.ops._library import define, no_gradient
from qcompile.kernels.qtensor import check_parts
from qcompile.kernels.scheme import Scheme


def dequantize(
    data: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The float value, of ``shape`` and ``dtype``, of codes stored as :class:`~qcompile.kernels.qtensor.QTensor` is."""
    parsed = Scheme.parse(scheme)
    check_parts(data, scale, zero, parsed, shape)
    return numerics.decode(numerics.fetch(data, parsed, shape), scale, zero, parsed, dtype).contiguous()


def _dequantize_fake(
    data: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    check_parts(data, scale, zero, Scheme.parse(scheme), shape)
    return data.new_empty(shape, dtype=dtype)


define(
    "dequantize(Tensor data, Tensor scale, Tensor? zero, str scheme, SymInt[] shape, ScalarType dtype) -> Tensor",
    dequantize,
    _dequantize_fake,
    backward=no_gradient("dequantize", "scale and zero point are constants; train the float weight instead"),
)
