"""``qcompile::quantize_weight``: a float matrix to codes, scales and zero points, each row by itself.

What :meth:`~qcompile.kernels.qtensor.QTensor.quantize` calls for a weight on a device that has a kernel for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import numerics
from qcompile.kernels.dtypes import qtype
from qcompile.kernels.ops._library import define, no_gradient
from qcompile.kernels.qparams import choose
from qcompile.kernels.scheme import Mode, PerChannel, PerGroup, Scheme

_SCHEMA = (
    "quantize_weight(Tensor weight, int bits, int group_size, str mode, ScalarType scale_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def quantize_weight(
    weight: Tensor, bits: int, group_size: int, mode: Mode, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round to nearest, with scales that cover the range of each group (clip ``"max"``).

    Args:
        weight: float32, float16 or bfloat16, ``[rows, cols]``.
        bits: of an integer dtype.
        group_size: columns that share a scale; 0 is one group a row.

    Returns:
        ``(data, scale, zero, squares)``: the stored codes (:meth:`Scheme.data_shape`); ``[rows, groups]`` both, the zero
        point without rows where the mode is symmetric; float64 ``[rows, 2]``: the sum of the squared errors and of the
        squares of each row. NaN there says that a row has no codes in this scheme (a value that is not finite, a scale
        that does not fit): what stands in its place elsewhere means nothing.
    """
    scheme = _scheme(bits, group_size, mode, scale_dtype)
    made = list(_empty(weight, scheme))
    for row in range(weight.shape[0]):
        part = weight[row : row + 1].contiguous()
        try:
            scale, zero = choose(part, scheme)
        except ValueError:
            made[3][row] = torch.nan
            continue
        codes = numerics.encode(part, scale, zero, scheme)
        made[0][row], made[1][row] = numerics.store(codes, scheme)[0], scale.reshape(-1)
        if zero is not None:
            made[2][row] = zero.reshape(-1)
        error = numerics.decode(codes, scale, zero, scheme, torch.float64) - part
        made[3][row, 0], made[3][row, 1] = error.square().sum(), part.double().square().sum()
    return tuple(made)  # type: ignore[return-value]


def _fake(
    weight: Tensor, bits: int, group_size: int, mode: Mode, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(weight, _scheme(bits, group_size, mode, scale_dtype))


def _scheme(bits: int, group_size: int, mode: Mode, scale_dtype: torch.dtype) -> Scheme:
    return Scheme(qtype(f"qint{bits}"), PerGroup(group_size) if group_size else PerChannel(0), mode, scale_dtype)


def _empty(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"quantize_weight takes a float matrix, got {weight.dtype} of shape {list(weight.shape)}")
    rows, cols = weight.shape
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else cols
    groups = -(-cols // min(size, cols)) if cols else 0
    return (
        weight.new_empty(scheme.data_shape([rows, cols]), dtype=scheme.data_dtype),
        weight.new_empty([rows, groups], dtype=scheme.scale_dtype),
        weight.new_empty(
            [0 if scheme.mode == "symmetric" else rows, groups],
            dtype=torch.uint8 if scheme.mode == "affine" else scheme.scale_dtype,
        ),
        weight.new_empty([rows, 2], dtype=torch.float64),
    )


_REASON = "codes are integers; fake_quantize_weight passes gradients straight through"
define(_SCHEMA, quantize_weight, _fake, backward=no_gradient("quantize_weight", _REASON))
