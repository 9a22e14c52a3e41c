"""``qcompile::embedding``: look rows up in a quantized table, decoding only those rows."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import numerics
from qcompile.kernels.ops._library import define, no_gradient
from qcompile.kernels.qtensor import check_parts
from qcompile.kernels.scheme import PerChannel, PerGroup, PerTensor, Scheme


def embedding(
    indices: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """``W[indices]`` with W of ``shape`` ``[V, ...]`` in codes; the result is ``[*indices.shape, *shape[1:]]``.

    Also takes tables of more axes: a stack of experts' matrices, looked up by a router.
    """
    parsed = _check(indices, data, scale, zero, scheme, shape)
    flat = indices.reshape(-1)
    codes = numerics.fetch(data.index_select(0, flat), parsed, [-1, *shape[1:]])
    rows_scale, rows_zero = scale, zero
    if not isinstance(parsed.granularity, PerTensor):
        rows_scale = scale.index_select(0, flat)
        rows_zero = None if zero is None else zero.index_select(0, flat)
    value = numerics.decode(codes, rows_scale, rows_zero, parsed, dtype)
    return value.reshape([*indices.shape, *shape[1:]])


def _embedding_fake(
    indices: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    _check(indices, data, scale, zero, scheme, shape)
    return data.new_empty([*indices.shape, *shape[1:]], dtype=dtype)


def _check(
    indices: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, shape: list[int]
) -> Scheme:
    parsed = Scheme.parse(scheme)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be an int64 or int32 tensor, got {indices.dtype}")
    if len(shape) < 2:
        raise ValueError(f"an embedding table has shape [V, D], got {list(shape)}")
    check_parts(data, scale, zero, parsed, shape)
    by_row = parsed.granularity in (PerTensor(), PerChannel(0)) or isinstance(parsed.granularity, PerGroup)
    if not by_row:
        raise ValueError(f"rows can be looked up one by one only where each has its own scale, got scheme {scheme}")
    return parsed


define(
    "embedding(Tensor indices, Tensor data, Tensor scale, Tensor? zero, str scheme, int[] shape, ScalarType dtype) "
    "-> Tensor",
    embedding,
    _embedding_fake,
    backward=no_gradient("embedding", "scale and zero point are constants; train the float table instead"),
)
