"""``qcompile::dequantize_planes`` and ``embedding_planes``: rows of a weight in the planes layout as floats, all or some."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define
from qcompile.kernels.ops._planes import check_planes, dequantize_planes_rows
from qcompile.kernels.ops._tiled import FLOATS

_PARTS = "Tensor codes, Tensor scale, Tensor? zero, int bits, str kind, int group_size, "


def check_dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int, cols: int, dtype: torch.dtype
) -> None:
    """Raise ValueError unless the arguments of ``dequantize_planes`` fit each other."""
    op = "qcompile::dequantize_planes"
    if dtype not in FLOATS:
        raise ValueError(f"{op}: dtype must be float32, float16 or bfloat16, got {dtype}")
    if codes.dim() != 2:
        raise ValueError(f"{op}: codes must be [N, elements], got {list(codes.shape)}")
    check_planes(op, codes, scale, zero, bits, kind, group_size, (codes.shape[0],), cols)


def dequantize_planes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """The weight ``[N, cols]`` in ``dtype``; the reference, in plain torch. Raises ValueError on a mismatch."""
    check_dequantize(codes, scale, zero, bits, kind, group_size, cols, dtype)
    return dequantize_planes_rows(codes, scale, zero, bits, kind, group_size, cols).to(dtype)


def _dequantize_fake(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int, cols: int, dtype: torch.dtype
) -> Tensor:
    check_dequantize(codes, scale, zero, bits, kind, group_size, cols, dtype)
    return codes.new_empty([codes.shape[0], cols], dtype=dtype)


def check_embedding(
    indices: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int,
    num_embeddings: int, embedding_dim: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise ValueError unless the arguments of ``embedding_planes`` fit each other."""
    op = "qcompile::embedding_planes"
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: indices must be int64 or int32, got {indices.dtype}")
    if dtype not in FLOATS:
        raise ValueError(f"{op}: dtype must be float32, float16 or bfloat16, got {dtype}")
    if num_embeddings < 1:
        raise ValueError(f"{op}: num_embeddings must be positive, got {num_embeddings}")
    check_planes(op, codes, scale, zero, bits, kind, group_size, (num_embeddings,), embedding_dim)


def embedding_planes(
    indices: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int,
    num_embeddings: int, embedding_dim: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``W[indices]`` ``[*indices.shape, embedding_dim]``; the reference, in plain torch.

    An index out of range raises an IndexError here. A GPU cannot raise without waiting: its kernel gives rows of NaN.
    """
    check_embedding(indices, codes, scale, zero, bits, kind, group_size, num_embeddings, embedding_dim, dtype)
    flat = indices.reshape(-1).long()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= num_embeddings):
        reach = f"{int(flat.min())}..{int(flat.max())}"
        raise IndexError(f"qcompile::embedding_planes: indices reach {reach}, allowed is 0..{num_embeddings - 1}")
    picked = None if zero is None else zero[flat]
    table = dequantize_planes_rows(codes[flat], scale[flat], picked, bits, kind, group_size, embedding_dim)
    return table.to(dtype).reshape(*indices.shape, embedding_dim)


def _embedding_fake(
    indices: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int,
    num_embeddings: int, embedding_dim: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_embedding(indices, codes, scale, zero, bits, kind, group_size, num_embeddings, embedding_dim, dtype)
    return codes.new_empty([*indices.shape, embedding_dim], dtype=dtype)


define(f"dequantize_planes({_PARTS}int cols, ScalarType dtype) -> Tensor", dequantize_planes, _dequantize_fake)
define(
    f"embedding_planes(Tensor indices, {_PARTS}int num_embeddings, int embedding_dim, ScalarType dtype) -> Tensor",
    embedding_planes,
    _embedding_fake,
)
