"""Linears on a GPU, written out for Inductor: a product and an epilogue in plain torch.

Where x is on a CUDA or HIP device and :func:`plan` does not leave it one call::

    y = linear_planes(x, …, bias, activation, mul, add)
    y = (act(planes_product(x, …) + bias) * mul + add).to(x.dtype)

``lowering.py`` makes the product a Triton template, and Inductor fuses the epilogue, and what else is done to y, into it.
The product with a gate is ``gated_planes_product``, which holds bias, activation and gate. Of so many rows that the weight
is decoded first, the product is the vendor's, and the epilogue one kernel of Inductor's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import optimization_hint

from qcompile.kernels.cuda import linear as cuda_linear
from qcompile.kernels.ops._epilogue import epilogue
from qcompile.kernels.triton.register import unusable
from qcompile.kernels.triton.table import CUDA_ROWS, Config, choose
from qcompile.kernels.triton.target import target_of

qc = torch.ops.qcompile

#: Rows of x that are assumed where nothing is known of a symbolic size.
UNKNOWN_ROWS = 64


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


def linear_planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None,
    glu: bool = False,
) -> Tensor:  # fmt: skip
    """The decomposition of ``qcompile::linear_planes``; NotImplemented where it stays one call."""
    planned = _planned(x, codes, bits, kind, group_size)
    if planned is None:
        return NotImplemented
    flat, options = x.reshape(-1, x.shape[-1]), (bits, kind, group_size)
    if planned[0].way == "dense":
        y = _dense(x, codes, scale, zero, bias, *options).float()
    elif glu:
        y = qc.gated_planes_product(flat, codes, scale, zero, bias, *options, activation)
        y, activation, glu = y.view(*x.shape[:-1], out_features), "none", False
    else:
        y = qc.planes_product(flat, codes, scale, zero, *options).view(*x.shape[:-1], codes.shape[0])
        y = y if bias is None else y + bias
    return epilogue(y, activation, mul, add, glu).to(x.dtype).contiguous()


def linear_planes_split(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The decomposition of ``qcompile::linear_planes_split`` where the weight is decoded first; else NotImplemented."""
    planned = _planned(x, codes, bits, kind, group_size)
    if planned is None or planned[0].way != "dense":
        return NotImplemented
    y = _dense(x, codes, scale, zero, bias, bits, kind, group_size)
    return [part.clone(memory_format=torch.contiguous_format) for part in y.split(list(sizes), dim=-1)]


def _planned(x: Tensor, codes: Tensor, bits: int, kind: str, group_size: int) -> tuple[Config, int] | None:
    rows = math.prod(x.shape[:-1])
    hint = optimization_hint(rows, fallback=UNKNOWN_ROWS)
    return plan(x.device, x.dtype, hint, type(rows) is int, codes.shape[0], x.shape[-1], bits, kind, group_size)


def _dense(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str, group_size: int
) -> Tensor:
    weight = qc.dequantize_planes(codes, scale, zero, bits, kind, group_size, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
