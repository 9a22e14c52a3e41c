"""Linears on a GPU, written out for Inductor: a product and an epilogue in plain torch.

Where x is on a CUDA or HIP device and nothing better is known for so few rows (:func:`plan`)::

    y = linear_planes(x, …, bias, activation, mul, add)
    y = (act(planes_product(x, …, bias)) * mul + add).to(x.dtype)

``lowering.py`` makes the product a Triton template, and Inductor fuses the epilogue, and what else is done to y, into it.
With a gate the product holds the activation, too. Of so many rows that the weight is decoded first, the product is the
vendor's, and the epilogue one kernel of Inductor's. ``linear_quantized`` becomes ``codes_product`` likewise, and siblings
are one product whose columns are cut. Of few rows ``norm_quantize`` is written out too, and joins the kernel that its input
is from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import optimization_hint

from qcompile.kernels.cuda import linear as cuda_linear
from qcompile.kernels.dtypes import qtype as find
from qcompile.kernels.ops import norm_quantize as norms
from qcompile.kernels.ops._epilogue import epilogue
from qcompile.kernels.scheme import Scheme
from qcompile.kernels.triton.register import unusable
from qcompile.kernels.triton.register_codes import fits, kinds_of
from qcompile.kernels.triton.table import CUDA_ROWS, Config, choose
from qcompile.kernels.triton.target import target_of

qc = torch.ops.qcompile

#: Rows of x that are assumed where nothing is known of a symbolic size.
UNKNOWN_ROWS = 64
#: Up to this many, a norm and rounding are better in the kernel before than in one that reads each row once.
NORM_ROWS = 64


def plan(
    device: torch.device, dtype: torch.dtype, rows: int, fixed: bool, n: int, cols: int, bits: int, kind: str,
    group_size: int,
) -> tuple[Config, int] | None:  # fmt: skip
    """The configuration of a product and the parts of K, or None where the operator stays one call.

    It stays one where Triton cannot run, and for the few rows that the CUDA C++ kernel takes, whose epilogue is its own.

    Args:
        rows: of x, or a hint where the number is not fixed; the kernel then takes any, in the configuration for the hint.
    """
    if device.type != "cuda" or rows == 0 or unusable(device) is not None:
        return None
    if fixed and rows <= CUDA_ROWS and cuda_linear.possible(device, dtype, rows, bits, kind, group_size, cols):
        return None
    # of a number of rows that varies, one or two are the special case
    return choose(target_of(device), rows if fixed else max(3, rows), n, cols, bits, dtype == torch.float32)


def plan_of(x: Tensor, n: int, bits: int, kind: str, group_size: int) -> tuple[Config, int] | None:
    """:func:`plan` of a linear on x ``[..., K]`` with a weight of ``n`` rows."""
    return plan(x.device, x.dtype, *_rows(x), n, x.shape[-1], bits, kind, group_size)


def linear_planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None,
    glu: bool = False,
) -> Tensor:  # fmt: skip
    """``qcompile::linear_planes``; NotImplemented where it stays one call."""
    y = _planes(x, codes, scale, zero, bias, bits, kind, group_size, activation if glu else None)
    return NotImplemented if y is None else _ended(y, x.dtype, activation, mul, add, glu)


def linear_planes_split(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """``qcompile::linear_planes_split``; NotImplemented where it stays one call."""
    y = _planes(x, codes, scale, zero, bias, bits, kind, group_size, None)
    return NotImplemented if y is None else qc.split_columns(y.to(x.dtype), sizes)


def linear_quantized(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], dtype: torch.dtype, activation: str = "none", mul: Tensor | None = None,
    add: Tensor | None = None, glu: bool = False,
) -> Tensor:  # fmt: skip
    """``qcompile::linear_quantized``; NotImplemented where it stays one call."""
    y = _codes(x, x_scale, data, scale, bias, x_scheme, scheme, shape, dtype, activation if glu else None)
    return NotImplemented if y is None else _ended(y, dtype, activation, mul, add, glu)


def linear_quantized_split(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], dtype: torch.dtype, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """``qcompile::linear_quantized_split``; NotImplemented where it stays one call."""
    y = _codes(x, x_scale, data, scale, bias, x_scheme, scheme, shape, dtype, None)
    return NotImplemented if y is None else qc.split_columns(y.to(dtype), sizes)


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, qtype: str, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``qcompile::norm_quantize``; NotImplemented where it stays one call: of many rows, or to a float8 unknown there."""
    kind = find(qtype)
    if x.device.type != "cuda" or _rows(x)[0] > NORM_ROWS or unusable(x.device) is not None:
        return NotImplemented
    if kind.is_float and str(kind.dtype).removeprefix("torch.float8_") not in target_of(x.device).float8:
        return NotImplemented
    return norms.norm_quantize(x, weight, bias, eps, norm, qtype, fixed)


def _rows(x: Tensor) -> tuple[int, bool]:
    """Rows of ``[..., K]``, or a hint of how many, and whether that is fixed."""
    rows = math.prod(x.shape[:-1])
    return optimization_hint(rows, fallback=UNKNOWN_ROWS), type(rows) is int


def _planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str, group_size: int,
    gate: str | None,
) -> Tensor | None:  # fmt: skip
    """``x @ W.T + bias``, in float32 but where the weight is decoded first; None: leave it one call."""
    planned = plan_of(x, codes.shape[0], bits, kind, group_size)
    if planned is None:
        return None
    if planned[0].way == "dense":
        weight = qc.dequantize_planes(codes, scale, zero, bits, kind, group_size, x.shape[-1], x.dtype)
        y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return y if gate is None else epilogue(y.float(), gate, None, None, glu=True)
    y = qc.planes_product(x.reshape(-1, x.shape[-1]), codes, scale, zero, bias, bits, kind, group_size, gate)
    return y.view(*x.shape[:-1], y.shape[-1])


def _codes(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], dtype: torch.dtype, gate: str | None,
) -> Tensor | None:  # fmt: skip
    if x.device.type != "cuda" or _rows(x)[0] == 0 or unusable(x.device) is not None:
        return None
    *_, native = kinds_of(Scheme.parse(x_scheme), Scheme.parse(scheme), target_of(x.device))
    if not (native and fits(x_scheme, scheme, shape, dtype)):
        return None
    token = x_scale if x_scale.dim() < 2 else x_scale.reshape(-1, 1)
    y = qc.codes_product(x.reshape(-1, x.shape[-1]), token, data, scale, bias, x_scheme, scheme, shape, gate)
    return y.view(*x.shape[:-1], y.shape[-1])


def _ended(
    y: Tensor, dtype: torch.dtype, activation: str, mul: Tensor | None, add: Tensor | None, glu: bool
) -> Tensor:
    """What follows the product, which holds bias and gate."""
    return epilogue(y.float(), "none" if glu else activation, mul, add, glu=False).to(dtype).contiguous()
