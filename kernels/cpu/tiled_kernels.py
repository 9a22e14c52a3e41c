"""The C++ kernels in the dispatch table: linears and lookups on the tiled layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qcompile.kernels.cpu.build import ensure_loaded
from qcompile.kernels.dispatch import Kernel, Packed, register
from qcompile.kernels.layouts import logical
from qcompile.kernels.layouts.tiled import Tiled, pack, unpack
from qcompile.kernels.numerics import store
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import Scheme


def _pack(weight: QTensor, parts: Sequence[int] | None, glu: bool) -> Packed:
    scheme, shape = weight.scheme, weight.shape
    bits = scheme.qtype.bits
    scale = logical.by_rows(weight.scale, scheme, shape)
    zero = None if weight.zero is None else logical.by_rows(weight.zero, scheme, shape)
    group_size = logical.group_size(scheme, shape[1])
    codes = weight.codes() if scheme.qtype.is_float else weight.unsigned_codes()
    tiled = pack(codes, scale, zero, bits, group_size, parts, glu)
    sizes = {"bits": bits, "group_size": group_size, "rows": shape[0], "cols": shape[1]}
    return Packed((tiled.codes, tiled.scale, tiled.zero), sizes)


def _unpack(packed: Packed, scheme: Scheme, shape: Sequence[int], parts: Sequence[int] | None, glu: bool) -> QTensor:
    """The exact inverse of :func:`_pack`."""
    sizes = packed.sizes
    packed_codes, packed_scale, packed_zero = packed.tensors
    if packed_codes is None or packed_scale is None:
        raise ValueError("a tiled weight has codes and scales")
    tiled = Tiled(
        packed_codes, packed_scale, packed_zero, sizes["bits"], sizes["group_size"], sizes["rows"], sizes["cols"],
        None if parts is None else tuple(parts), glu,
    )  # fmt: skip
    codes, *rest = unpack(tiled)
    if scheme.mode == "symmetric" and not scheme.qtype.is_float:
        codes, rest = (codes.to(torch.int16) - scheme.qtype.offset).to(torch.int8), [rest[0], None]
    scale, zero = (None if part is None else logical.stored(part, scheme, shape) for part in rest)
    return QTensor(store(codes, scheme), scale, zero, scheme, tuple(shape))  # type: ignore[arg-type]


def _linear_arguments(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    features = sizes["rows"] // 2 if args["glu"] else sizes["rows"]
    return (
        args["x"], *tensors, args["bias"], sizes["bits"], sizes["group_size"], features,
        args["activation"], args["mul"], args["add"], args["glu"], *_rounding(args),
    )  # fmt: skip


def _split_arguments(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    return args["x"], *tensors, args["bias"], sizes["bits"], sizes["group_size"], args["sizes"], *_rounding(args)


def _rounding(args: Mapping[str, Any]) -> tuple[Any, ...]:
    """``exact``, ``x_scale`` and ``per_row``: activations that are rounded on purpose cannot stay float."""
    x_scale, per_row = args.get("x_scale"), args.get("per_row", False)
    return args["exact"] and x_scale is None and not per_row, x_scale, per_row


def _embedding_arguments(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        args["indices"], *tensors, sizes["bits"], sizes["group_size"], sizes["rows"], sizes["cols"], args["dtype"]
    )  # fmt: skip


qc = torch.ops.qcompile
for _operator, _target, _arguments, _rounds in (
    ("linear", qc.linear_tiled.default, _linear_arguments, ("qint8",)),
    ("linear_split", qc.linear_tiled_split.default, _split_arguments, ("qint8",)),
    ("embedding", qc.embedding_tiled.default, _embedding_arguments, ()),
):
    _takes = partial(logical.refuses_matrix, floats=True)
    register(Kernel("cpu-tiled", _operator, "cpu", _target, _takes, _pack, _arguments, ensure_loaded, _unpack, _rounds))
