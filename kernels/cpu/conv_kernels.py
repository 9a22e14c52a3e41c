"""The C++ kernels for convolutions in the dispatch table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.cpu.build import ensure_loaded
from qcompile.kernels.dispatch import Kernel, Packed, register
from qcompile.kernels.layouts import depthwise, logical
from qcompile.kernels.layouts.conv import choose_order, columns, packed_columns
from qcompile.kernels.layouts.tiled import Tiled, pack, unpack
from qcompile.kernels.numerics import store
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import Scheme

#: Positions that a depthwise kernel may have; the C++ holds their decoded weights in a fixed buffer.
_MOST_TAPS = 512

#: What activations are rounded to by the kernels, where one scale is known for all of them.
_ROUNDS = ("qint8",)


def _refuses(scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    if len(shape) not in (3, 4):
        return f"takes one or two dimensions, not {len(shape) - 2}"
    return logical.refuses_matrix(scheme, [shape[0], max(1, *shape[1:])], dtype)


def _refuses_call(args: Mapping[str, Any]) -> str | None:
    if args["transposed"]:
        return "takes no transposed convolution"
    rows = args["weight_shape"][0] // args["groups"]
    if args["groups"] > 1 and rows < 8:
        return f"takes 8 or more output channels a group, not {rows}"
    return _refuses_padding(args)


def _refuses_padding(args: Mapping[str, Any]) -> str | None:
    sizes = [*args["padding"], *args["stride"], *args["dilation"], *args["pad"]]
    if not all(isinstance(n, int) for n in sizes):
        return "takes padding of known size only"
    if min(*args["padding"], *args["pad"], 0) < 0:
        return "takes no negative padding"
    return None


def _refuses_depthwise(args: Mapping[str, Any]) -> str | None:
    shape = args["weight_shape"]
    if args["groups"] != shape[0] or shape[1] != 1:
        return "takes one input and one output channel a group"
    if _positions(shape) > _MOST_TAPS:
        return f"takes kernels of up to {_MOST_TAPS} positions"
    return "takes no transposed convolution" if args["transposed"] else _refuses_padding(args)


def _positions(shape: Sequence[int]) -> int:
    count = 1
    for size in shape[2:]:
        count *= size
    return count


def _pack(weight: QTensor, parts: Sequence[int] | None, glu: bool) -> Packed:
    """``parts``: the shape of the weight, and its groups of channels."""
    if parts is None:
        raise ValueError("a convolution is packed for the shape of its weight, which was not given")
    *shape, groups = parts
    codes, bits = weight.unsigned_codes(), weight.scheme.qtype.bits
    scale = logical.by_rows(weight.scale, weight.scheme, weight.shape)
    zero = logical.zero_by_rows(weight.zero, scale, weight.scheme, weight.shape, bits)
    group_size = logical.group_size(weight.scheme, weight.shape[1])
    order = choose_order(shape, group_size)
    ordered = codes.new_zeros(codes.shape[0], packed_columns(shape, order))
    ordered[:, columns(shape, order, group_size)] = codes
    tiled = pack(ordered, scale, zero, bits, group_size, [shape[0] // groups] * groups)
    return Packed((tiled.codes, tiled.scale, tiled.zero), _sizes(weight, parts, bits))


def _unpack(packed: Packed, scheme: Scheme, shape: Sequence[int], parts: Sequence[int] | None, glu: bool) -> QTensor:
    if parts is None:
        raise ValueError("a convolution is unpacked for the shape of its weight, which was not given")
    *window, groups = parts
    size = logical.group_size(scheme, shape[1])
    order = choose_order(window, size)
    held_codes, held_scale, held_zero = packed.tensors
    if held_codes is None or held_scale is None:
        raise ValueError("a packed convolution has codes and scales")
    tiled = Tiled(
        held_codes, held_scale, held_zero, packed.sizes["bits"], size, shape[0], packed_columns(window, order),
        tuple([window[0] // groups] * groups),
    )  # fmt: skip
    codes, scale, zero = unpack(tiled)
    return _logical(codes[:, columns(window, order, size)], scale, zero, scheme, shape)


def _pack_depthwise(weight: QTensor, parts: Sequence[int] | None, glu: bool) -> Packed:
    if parts is None:
        raise ValueError("a convolution is packed for the shape of its weight, which was not given")
    held = (weight.scale, weight.zero)
    scale, zero = (None if t is None else logical.by_rows(t, weight.scheme, weight.shape) for t in held)
    tensors = (None if t is None else depthwise.tile(t) for t in (weight.unsigned_codes(), scale, zero))
    return Packed(tuple(tensors), _sizes(weight, parts, weight.scheme.qtype.bits))


def _unpack_depthwise(
    packed: Packed, scheme: Scheme, shape: Sequence[int], parts: Sequence[int] | None, glu: bool
) -> QTensor:
    codes, scale, zero = (None if t is None else depthwise.untile(t, shape[0]).contiguous() for t in packed.tensors)
    return _logical(codes, scale, zero, scheme, shape)  # type: ignore[arg-type]


def _logical(codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, shape: Sequence[int]) -> QTensor:
    zero = None if zero is None or scheme.mode == "symmetric" else logical.stored(zero, scheme, shape)
    data = store(logical.signed(codes.contiguous(), scheme), scheme)
    return QTensor(data, logical.stored(scale, scheme, shape), zero, scheme, tuple(shape))


def _sizes(weight: QTensor, parts: Sequence[int], bits: int) -> dict[str, int]:
    rows, cols = weight.shape
    return {"bits": bits, "group_size": logical.group_size(weight.scheme, cols), "rows": rows, "cols": cols}


def _padding(args: Mapping[str, Any]) -> list[int]:
    """Zeros before each axis, then after each: the convolution's own, and those put around x beforehand."""
    axes = len(args["padding"])
    pad = [*args["pad"], *([0] * (2 * axes - len(args["pad"])))]
    own = args["padding"]
    return [own[i] + pad[2 * (axes - 1 - i) + side] for side in (0, 1) for i in range(axes)]


def _arguments(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    shape = args["weight_shape"]
    order = choose_order(shape, sizes["group_size"])
    return (
        args["x"], *tensors, args["bias"], sizes["bits"], sizes["group_size"], order, shape, args["stride"],
        _padding(args), args["dilation"], args["groups"], args["activation"], args["add"], args["after"],
        args["exact"] and args.get("x_scale") is None, args.get("x_scale"),
    )  # fmt: skip


def _depthwise_arguments(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        args["x"], *tensors, args["bias"], sizes["bits"], sizes["group_size"], args["weight_shape"], args["stride"],
        _padding(args), args["dilation"], args["activation"], args["add"], args["after"], args.get("x_scale"),
    )  # fmt: skip


qc = torch.ops.qcompile
register(
    Kernel(
        "cpu-conv",
        "conv",
        "cpu",
        qc.conv_tiled.default,
        _refuses,
        _pack,
        _arguments,
        ensure_loaded,
        _unpack,
        _ROUNDS,
        refuses_call=_refuses_call,
    )
)
register(
    Kernel(
        "cpu-depthwise", "conv", "cpu", qc.conv_depthwise.default, _refuses, _pack_depthwise, _depthwise_arguments,
        ensure_loaded, _unpack_depthwise, _ROUNDS, refuses_call=_refuses_depthwise,
    )
)  # fmt: skip
