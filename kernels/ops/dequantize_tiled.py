"""``qcompile::dequantize_tiled``: the first ``rows`` packed rows of a tiled weight, as a float matrix ``[rows, cols]``.

Rows come in packed order: of siblings or a glu pair ask for all ``tiles * 16`` rows and pick them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.layouts.tiled import TILE
from qcompile.kernels.ops._library import define
from qcompile.kernels.ops._tiled import FLOATS, check_weight, dequantize_rows

_OP = "qcompile::dequantize_tiled"

_SCHEMA = (
    "dequantize_tiled(Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size, int rows, int cols, "
    "ScalarType dtype) -> Tensor"
)


def _check(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{_OP}: dtype must be float32, float16 or bfloat16, got {dtype}")
    check_weight(_OP, codes, scale, zero, bits, group_size, codes.shape[0], cols)
    if rows < 0 or rows > codes.shape[0] * TILE:
        raise ValueError(f"{_OP}: rows must be in 0..{codes.shape[0] * TILE} (16 a tile), got {rows}")


def _fake(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, zero, bits, group_size, rows, cols, dtype)
    return codes.new_empty([rows, cols], dtype=dtype)


def dequantize_tiled(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """The reference, in plain torch; raises ValueError on a mismatch."""
    _check(codes, scale, zero, bits, group_size, rows, cols, dtype)
    return dequantize_rows(codes, scale, zero, bits, group_size, cols)[:rows].to(dtype, copy=True)


define(_SCHEMA, dequantize_tiled, _fake)
