"""Plain numpy float64 versions of what floor 1 computes, written without looking at how it computes it.

Nothing here imports qcompile's numerics: only the scheme, which says what is to be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.testing._internal.optests
from numpy.typing import NDArray
from torch import Tensor

from qcompile.kernels import PerBlock, PerChannel, PerGroup, PerTensor, QTensor, Scheme

Array = NDArray[np.float64]


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal data with two outliers in a hundred, twenty times as large."""
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    x = torch.randn(shape, generator=generator)
    outlier = torch.rand(shape, generator=generator) < 0.02
    return torch.where(outlier, 20 * x, x).to(dtype)


def wide(x: Tensor) -> Array:
    """Any tensor as a float64 array."""
    return x.detach().to(torch.float64).numpy()


def scale_index(shape: Sequence[int], scheme: Scheme) -> tuple[NDArray[np.intp], ...]:
    """For each element of a tensor of ``shape``, where its scale stands: index arrays into the scale."""
    index = np.indices(tuple(shape))
    match scheme.granularity:
        case PerTensor():
            return ()
        case PerChannel(axis=axis):
            return (index[axis],)
        case PerGroup(size=size):
            return (*index[:-1], index[-1] // size)
        case PerBlock(rows=rows, cols=cols):
            return (*index[:-2], index[-2] // rows, index[-1] // cols)
    raise AssertionError(scheme)


def each(scale: Tensor, shape: Sequence[int], scheme: Scheme) -> Array:
    """The scale (or zero point) of each element, in the shape of the value."""
    index = scale_index(shape, scheme)
    return np.broadcast_to(wide(scale), tuple(shape)) if not index else wide(scale)[index]


def runs(x: Array, scheme: Scheme) -> dict[tuple[int, ...], Array]:
    """The values that share each scale."""
    index = scale_index(x.shape, scheme)
    if not index:
        return {(): x.reshape(-1)}
    found: dict[tuple[int, ...], list[float]] = {}
    for position in np.ndindex(x.shape):
        found.setdefault(tuple(int(i[position]) for i in index), []).append(x[position])
    return {key: np.array(values) for key, values in found.items()}


def sums(x: Array, scheme: Scheme) -> Array:
    """The sum of the values that share each scale, in the shape of the scale."""
    total = np.zeros(scheme.scale_shape(x.shape))
    np.add.at(total, scale_index(x.shape, scheme), x if total.shape else x.sum())
    return total


def codes(q: QTensor) -> Array:
    """Unpacked codes from the stored bytes, bit by bit."""
    if q.scheme.qtype.bits == 8:
        return wide(q.data)
    bits, length = q.scheme.qtype.bits, q.shape[-1]
    stream = np.unpackbits(q.data.numpy(), axis=-1, bitorder="little")[..., : length * bits]
    weights = 1 << np.arange(bits)
    unsigned = (stream.reshape(*stream.shape[:-1], length, bits) * weights).sum(-1).astype(np.float64)
    return unsigned - (1 << (bits - 1)) if q.scheme.mode == "symmetric" else unsigned


def value(q: QTensor) -> Array:
    """The float value that a quantized tensor stands for."""
    scale = each(q.scale, q.shape, q.scheme)
    if q.scheme.mode == "symmetric":
        return codes(q) * scale
    if q.zero is None:
        raise AssertionError("no zero point")
    zero = each(q.zero, q.shape, q.scheme)
    return (codes(q) - zero) * scale if q.scheme.mode == "affine" else codes(q) * scale + zero


def relative(got: Tensor, want: Array, *terms: Array) -> float:
    """The norm of the difference over the norm of what is wanted, or of the largest term whose sum that is."""
    got_array = wide(got)
    if got_array.shape != want.shape:
        raise AssertionError(f"shape {got_array.shape}, wanted {want.shape}")
    if want.size == 0:
        return 0.0
    size = max(float(np.linalg.norm(term)) for term in (want, *terms))
    return float(np.linalg.norm(got_array - want) / max(size, 1e-30))


def opcheck(op: Any, args: Sequence[Any]) -> None:
    """``torch.library.opcheck``, less the schema test where an argument is float8, which that test cannot compare."""
    tests = torch.testing._internal.optests.generate_tests.DEFAULT_TEST_UTILS
    if any(isinstance(arg, Tensor) and arg.is_floating_point() and arg.element_size() == 1 for arg in args):
        tests = [name for name in tests if name != "test_schema"]
    torch.library.opcheck(op, tuple(args), test_utils=tests)


#: How far a product of a few hundred terms may lie from float64 when x, weight and result have this dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}

#: Schemes that between them have every dtype, granularity that fits a matrix, mode and scale dtype.
SCHEMES = [
    "qint2/group=16/affine/float16",
    "qint2/group=32/symmetric/bfloat16",
    "qint3/channel=0/symmetric/float32",
    "qint3/group=5/shift/float16",
    "qint4/group=32/affine/float16",
    "qint4/group=7/shift/bfloat16",
    "qint4/tensor/symmetric/float32",
    "qint4/block=3x8/affine/float32",
    "qint5/channel=1/affine/bfloat16",
    "qint6/group=64/symmetric/float16",
    "qint8/channel=0/symmetric/float32",
    "qint8/channel=-1/shift/float32",
    "qint8/block=4x4/symmetric/bfloat16",
    "qint8/group=32/affine/float16",
    "qfloat8_e4m3fn/channel=0/symmetric/float32",
    "qfloat8_e4m3fn/block=16x16/symmetric/bfloat16",
    "qfloat8_e4m3fnuz/tensor/symmetric/float32",
    "qfloat8_e5m2/group=32/symmetric/float16",
]
