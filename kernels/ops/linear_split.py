"""``qcompile::linear_split``: several linears that read the same input, their weights stacked, as one product."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define
from qcompile.kernels.ops.dequantize import dequantize
from qcompile.kernels.ops.linear import check_features
from qcompile.kernels.qtensor import check_parts
from qcompile.kernels.scheme import Scheme


def linear_split(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, shape: list[int],
    sizes: list[int],
) -> list[Tensor]:  # fmt: skip
    """``x @ W.T + bias`` cut along its last axis in parts of ``sizes``, each contiguous; W is ``[sum(sizes), K]``."""
    _check(x, data, scale, zero, scheme, shape, sizes)
    out = torch.nn.functional.linear(x, dequantize(data, scale, zero, scheme, shape, x.dtype), bias)
    # clone, for a single part would else be returned twice under one storage
    return [part.clone(memory_format=torch.contiguous_format) for part in out.split(sizes, dim=-1)]


def _fake(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scheme: str, shape: list[int],
    sizes: list[int],
) -> list[Tensor]:  # fmt: skip
    _check(x, data, scale, zero, scheme, shape, sizes)
    return [x.new_empty((*x.shape[:-1], size)) for size in sizes]


def _check(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, shape: list[int], sizes: list[int]
) -> None:
    check_parts(data, scale, zero, Scheme.parse(scheme), shape)
    check_features(x, shape)
    if sum(sizes) != shape[0] or min(sizes, default=0) < 1:
        raise ValueError(f"sizes {list(sizes)} do not cut a weight of {shape[0]} rows into parts")


define(
    "linear_split(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, str scheme, int[] shape, int[] sizes) "
    "-> Tensor[]",
    linear_split,
    _fake,
)
