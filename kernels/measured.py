"""How far quantizing moves a weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.kernels.qtensor import How, QTensor, quantized
from qcompile.kernels.scheme import Scheme

#: Elements of a weight that are decoded at a time to measure its error.
_SLICE = 1 << 18


def measured(x: Tensor, scheme: Scheme, clip: How = "max") -> tuple[QTensor, float]:
    """:meth:`QTensor.quantize`, and the :func:`relative_error` of what it gives."""
    value, squares = quantized(x, scheme, clip)
    return value, relative_error(value, x) if squares is None else _relative(squares.error, squares.norm)


def relative_error(quantized: QTensor, tensor: Tensor) -> float:
    """``|dequantized - tensor| / |tensor|`` in the Frobenius norm; 0 for an all-zero tensor that stays zero."""
    rows = max(1, _SLICE * tensor.shape[0] // max(1, tensor.numel()))
    whole = quantized.dequantize() if tensor.shape[0] <= rows else None
    error = norm = 0.0
    for start in range(0, tensor.shape[0], rows):
        part = tensor[start : start + rows].detach().float()
        value = whole if whole is not None else _rows(quantized, start, part.shape[0])
        # A slice's norm is exact enough in float32; the sum over slices is in Python's float64.
        error += float(torch.linalg.vector_norm(value.sub_(part))) ** 2
        norm += float(torch.linalg.vector_norm(part)) ** 2
    return _relative(error, norm)


def _relative(error: float, norm: float) -> float:
    return (error / norm) ** 0.5 if norm else (0.0 if error == 0 else float("inf"))


def _rows(quantized: QTensor, start: int, count: int) -> Tensor:
    """Rows ``start`` to ``start + count`` of a value, decoded without decoding the rest."""
    if not quantized.scheme.by_row:
        return quantized.dequantize()[start : start + count]
    zero = None if quantized.zero is None else quantized.zero[start : start + count]
    part = replace(
        quantized,
        data=quantized.data[start : start + count],
        scale=quantized.scale[start : start + count],
        zero=zero,
        shape=(count, *quantized.shape[1:]),
    )
    return part.dequantize()
