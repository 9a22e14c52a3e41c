"""The Triton kernel for activations in codes, in the dispatch table: int8 x int8, float8 x float8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qcompile.kernels.dispatch import Kernel, Packed, register
from qcompile.kernels.layouts.logical import group_size
from qcompile.kernels.ops import linear_quantized
from qcompile.kernels.ops._library import lib
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import PerChannel, PerGroup, PerTensor, Scheme
from qcompile.kernels.triton.register import float8_note, launcher, unusable
from qcompile.kernels.triton.table import CODES_GROUP
from qcompile.kernels.triton.target import Target, target_of

_CUDA = torch.device("cuda")


def refuses_weight(scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take a weight and give that dtype, wherever it runs; None where it can."""
    if scheme.mode != "symmetric" or scheme.qtype.bits != 8:
        return f"takes symmetric weights of 8 bits, not {scheme}"
    if len(shape) != 2 or min(shape) < 1:
        return f"takes a matrix, not shape {list(shape)}"
    by_row = scheme.granularity in (PerChannel(0), PerChannel(-2), PerTensor())
    if not by_row and not (isinstance(scheme.granularity, PerGroup) and group_size(scheme, shape[1]) % 32 == 0):
        return f"takes scales of rows, or of groups of a multiple of 32, not {scheme.granularity}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"gives float32, float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def fits(x_scheme: str, scheme: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the kernel can multiply these."""
    left = Scheme.parse(x_scheme).granularity
    by_token = left == PerTensor() or (isinstance(left, PerGroup) and left.size >= shape[-1])
    return by_token and refuses_weight(Scheme.parse(scheme), shape, dtype) is None


def kinds_of(left: Scheme, right: Scheme, target: Target) -> tuple[str, str, bool]:
    """What the codes of x and of W are, ``int`` or a float8's name, and whether tensor cores multiply them as they are."""
    x, w = (str(s.qtype.dtype).removeprefix("torch.float8_") if s.qtype.is_float else "int" for s in (left, right))
    return x, w, x == w and (x == "int" or x in target.float8)


def _refuses(scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    why = refuses_weight(scheme, shape, dtype) or unusable(_CUDA)
    target, group = target_of(_CUDA), group_size(scheme, shape[-1])
    if why is None and 0 < group < CODES_GROUP[target.family]:
        return f"groups of {group} cost more than a float product on {target.arch}"
    return why


def _refuses_call(args: Mapping[str, Any]) -> str | None:
    """Both sides must be integers, or both floats; a scale for each token, or one for all."""
    x_scheme, scheme = Scheme.parse(args["x_scheme"]), Scheme.parse(args["scheme"])
    if x_scheme.qtype.bits != 8 or x_scheme.qtype.is_float != scheme.qtype.is_float:
        return f"does not multiply {x_scheme.qtype} by {scheme.qtype}"
    return None


def _pack(weight: QTensor, parts: Sequence[int] | None, glu: bool) -> Packed:
    """As it is stored: a byte a code, K contiguous."""
    return Packed((weight.data.contiguous(), weight.scale.contiguous()), {"rows": weight.shape[0], "cols": weight.shape[1]})


def _unpack(packed: Packed, scheme: Scheme, shape: Sequence[int], parts: Sequence[int] | None, glu: bool) -> QTensor:
    data, scale = packed.tensors
    if data is None or scale is None:
        raise ValueError("a packed weight has codes and scales")
    return QTensor(data, scale, None, scheme, tuple(shape))


def _arguments(tensors: Sequence[Any], sizes: Mapping[str, int], args: Mapping[str, Any]) -> tuple[Any, ...]:
    product = (args["x"], args["x_scale"], *tensors, args["bias"], args["x_scheme"], args["scheme"], args["shape"])
    if "sizes" in args:
        return (*product, args["dtype"], args["sizes"])
    return (*product, args["dtype"], args["activation"], args["mul"], args["add"], args["glu"])


qc = torch.ops.qcompile
for _name in ("linear_quantized", "linear_quantized_split"):
    register(
        Kernel(
            "triton-codes", _name, "cuda", getattr(qc, _name).default, _refuses, _pack, _arguments, unpack=_unpack,
            refuses_call=_refuses_call, note=float8_note,
        )
    )  # fmt: skip
    lib.impl(_name, launcher("quantized", _name, getattr(linear_quantized, _name)), "CUDA")
