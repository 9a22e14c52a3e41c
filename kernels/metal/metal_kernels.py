"""The Metal kernels in the dispatch table: weight-only integer linears on the ``rows`` layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qcompile.kernels.dispatch import Kernel, Packed, register
from qcompile.kernels.layouts import logical, rows
from qcompile.kernels.metal import linear as _linear  # noqa: F401  (registers the operators' kernels)
from qcompile.kernels.numerics import store
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import Scheme


def _pack(weight: QTensor, parts: Sequence[int] | None, glu: bool) -> Packed:
    """Siblings, and gate and up rows, stay where they are: the layout is the weight's own order."""
    scheme, shape = weight.scheme, weight.shape
    bits = logical.container(scheme.qtype.bits, rows.BITS)
    scale = logical.by_rows(weight.scale, scheme, shape)
    zero = logical.zero_by_rows(weight.zero, scale, scheme, shape, bits)
    group_size = logical.group_size(scheme, shape[1])
    packed = rows.pack(weight.unsigned_codes(), scale, zero, bits, group_size)
    sizes = {"bits": bits, "group_size": group_size, "rows": shape[0], "cols": shape[1]}
    return Packed((packed.codes, packed.scale, packed.zero), sizes)


def _unpack(packed: Packed, scheme: Scheme, shape: Sequence[int], parts: Sequence[int] | None, glu: bool) -> QTensor:
    """The exact inverse of :func:`_pack`."""
    codes, scale, zero = packed.tensors
    if codes is None or scale is None:
        raise ValueError("a packed weight has codes and scales")
    sizes = packed.sizes
    unsigned = rows.unpack_codes(codes, sizes["bits"], sizes["group_size"], sizes["cols"])
    # a symmetric weight in a wider container has a zero point in its layout only
    zero = None if zero is None or scheme.mode == "symmetric" else logical.stored(zero, scheme, shape)
    data = store(logical.signed(unsigned, scheme), scheme)
    return QTensor(data, logical.stored(scale, scheme, shape), zero, scheme, tuple(shape))


def _linear_arguments(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    features = sizes["rows"] // 2 if args["glu"] else sizes["rows"]
    return (
        args["x"], *tensors, args["bias"], sizes["bits"], sizes["group_size"], features,
        args["activation"], args["mul"], args["add"], args["glu"],
    )  # fmt: skip


def _split_arguments(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    return args["x"], *tensors, args["bias"], sizes["bits"], sizes["group_size"], args["sizes"]


qc = torch.ops.qcompile
for _operator, _target, _arguments in (
    ("linear", qc.linear_rows.default, _linear_arguments),
    ("linear_split", qc.linear_rows_split.default, _split_arguments),
):
    register(Kernel("metal-rows", _operator, "mps", _target, logical.refuses_matrix, _pack, _arguments, unpack=_unpack))
