"""``qcompile::grouped_linear_planes``: one linear for each of a stack of packed weights (mixture of experts)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.ops._library import define, no_gradient
from qcompile.kernels.ops._planes import check_planes, dequantize_planes_rows
from qcompile.kernels.ops._tiled import check_input

_OP = "qcompile::grouped_linear_planes"


def check_grouped(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offsets: Tensor | None, bits: int, kind: str,
    group_size: int,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError unless the arguments of ``grouped_linear_planes`` fit each other."""
    check_input(_OP, x)
    if codes.dim() != 3:
        raise ValueError(f"{_OP}: codes must be [E, N, elements], got {list(codes.shape)}")
    experts = codes.shape[0]
    if offsets is not None and offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{_OP}: offsets must be an int32 or int64 tensor, got {offsets.dtype}")
    if offsets is None:
        fits = x.dim() == 3 and x.shape[0] == experts
    else:
        fits = x.dim() == 2 and tuple(offsets.shape) == (experts,)
    if not fits:
        ends = "no offsets" if offsets is None else f"offsets of shape {list(offsets.shape)}"
        raise ValueError(
            f"{_OP}: x of shape {list(x.shape)} with {ends} does not fit {experts} weights: expected [E, M, K] without "
            f"offsets, or [T, K] with offsets of shape [E]"
        )
    check_planes(_OP, codes, scale, zero, bits, kind, group_size, (experts, codes.shape[1]), x.shape[-1])


def grouped_linear_planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offsets: Tensor | None, bits: int, kind: str,
    group_size: int,
) -> Tensor:  # fmt: skip
    """Linears with weights ``[E, N, K]``; arguments and result as those of ``qcompile::grouped_linear``.

    The reference, in plain torch and float32. Raises ValueError or TypeError on arguments that do not fit.
    """
    check_grouped(x, codes, scale, zero, offsets, bits, kind, group_size)
    experts, rows = codes.shape[:2]
    lead, zeros = (experts * rows, -1), None if zero is None else zero.reshape(experts * rows, -1)
    weight = dequantize_planes_rows(codes.reshape(lead), scale.reshape(lead), zeros, bits, kind, group_size, x.shape[-1])
    weight = weight.view(experts, rows, -1)
    if offsets is None:
        return torch.bmm(x.float(), weight.transpose(1, 2)).to(x.dtype)
    owner = torch.searchsorted(offsets.to(torch.int64), torch.arange(x.shape[0], device=x.device), right=True)
    out = x.new_zeros((x.shape[0], rows), dtype=torch.float32)
    for expert in range(experts):
        out = torch.where((owner == expert).unsqueeze(1), x.float() @ weight[expert].t(), out)
    return out.to(x.dtype)


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offsets: Tensor | None, bits: int, kind: str,
    group_size: int,
) -> Tensor:  # fmt: skip
    check_grouped(x, codes, scale, zero, offsets, bits, kind, group_size)
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


define(
    "grouped_linear_planes(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? offsets, int bits, str kind, "
    "int group_size) -> Tensor",
    grouped_linear_planes,
    _fake,
    backward=no_gradient("grouped_linear_planes", "train the float experts, or compile with gradients switched off"),
)
