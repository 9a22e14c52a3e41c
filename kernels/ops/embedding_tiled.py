"""``qcompile::embedding_tiled``: rows of a packed table, decoded as they are looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.layouts.tiled import TILE
from qcompile.kernels.ops._library import define
from qcompile.kernels.ops._tiled import FLOATS, ceil_div, check_weight, dequantize_rows

_OP = "qcompile::embedding_tiled"

_SCHEMA = (
    "embedding_tiled(Tensor indices, Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size, "
    "int num_embeddings, int embedding_dim, ScalarType dtype) -> Tensor"
)


def _check(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> None:
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{_OP}: indices must be int64 or int32, got {indices.dtype}")
    if dtype not in FLOATS:
        raise ValueError(f"{_OP}: dtype must be float32, float16 or bfloat16, got {dtype}")
    if num_embeddings < 1:
        raise ValueError(f"{_OP}: num_embeddings must be positive, got {num_embeddings}")
    check_weight(_OP, codes, scale, zero, bits, group_size, ceil_div(num_embeddings, TILE), embedding_dim)


def _fake(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(indices, codes, scale, zero, bits, group_size, num_embeddings, embedding_dim, dtype)
    return codes.new_empty([*indices.shape, embedding_dim], dtype=dtype)


def embedding_tiled(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """The reference, in plain torch; raises ValueError on a mismatch, IndexError on an index out of range."""
    _check(indices, codes, scale, zero, bits, group_size, num_embeddings, embedding_dim, dtype)
    flat = indices.reshape(-1).long()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= num_embeddings):
        raise IndexError(f"{_OP}: indices reach {int(flat.min())}..{int(flat.max())}, allowed is 0..{num_embeddings - 1}")
    # only the tiles that are asked for are decoded
    tiles, inverse = torch.unique(flat // TILE, return_inverse=True)
    picked = None if zero is None else zero[tiles]
    table = dequantize_rows(codes[tiles], scale[tiles], picked, bits, group_size, embedding_dim)
    return table[inverse * TILE + flat % TILE].to(dtype).reshape(*indices.shape, embedding_dim)


define(_SCHEMA, embedding_tiled, _fake)
