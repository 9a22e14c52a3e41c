"""Mixture of experts: each run of rows of x times its expert's weight, in one launch, with nothing known on the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.layouts.planes import block_columns
from qcompile.kernels.ops.grouped_planes import check_grouped
from qcompile.kernels.triton.gemm import accumulate, row_scale
from qcompile.kernels.triton.linear import precision, zero_mode
from qcompile.kernels.triton.table import grouped
from qcompile.kernels.triton.target import target_of


@triton.jit
def grouped_gemm(
    x, codes, scale, zero, offsets, out, experts, N, K, x_stride, elements, blocks, groups,
    BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, EXPERTS: tl.constexpr, PRECISION: tl.constexpr, HIP: tl.constexpr = False,
):  # fmt: skip
    """Grid ``(ceil(N / BN), most tiles of x)``; out ``[T, N]`` holds zeros before.

    Each expert's rows are cut into tiles of BM rows; a program finds which expert its tile belongs to by the running sum of
    tiles, so that nothing has to be known on the host. EXPERTS: a power of two of at least ``experts``.
    """
    tile = tl.program_id(1)
    index = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + index, mask=index < experts, other=0).to(tl.int32)
    starts = tl.load(offsets + index - 1, mask=(index > 0) & (index < experts), other=0).to(tl.int32)
    tiles = (tl.maximum(ends - starts, 0) + (BM - 1)) // BM
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    if expert < experts:
        mine = index == expert
        first_row = tl.sum(tl.where(mine, starts + (tile - until + tiles) * BM, 0), 0)
        end_row = tl.sum(tl.where(mine, ends, 0), 0)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        m = first_row + tl.arange(0, BM)
        row = expert.to(tl.int64) * N + tl.minimum(n, N - 1).to(tl.int64)
        x_row = tl.minimum(m, end_row - 1).to(tl.int64)
        acc = accumulate(
            tl.zeros((BN, BM), tl.float32), x, codes, scale, zero, row, x_row, K, x_stride, elements, groups, 0, blocks,
            BITS, KIND, ZERO, GROUP, EVEN, PRECISION, HIP,
        )  # fmt: skip
        acc = row_scale(acc, scale, row, KIND, ZERO, GROUP)
        mask = (n < N)[:, None] & (m < end_row)[None, :]
        tl.store(out + m.to(tl.int64)[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=mask)


def grouped_linear_planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offsets: Tensor | None, bits: int, kind: str,
    group_size: int,
) -> Tensor:  # fmt: skip
    """See :func:`qcompile.kernels.ops.grouped_planes.grouped_linear_planes`."""
    check_grouped(x, codes, scale, zero, offsets, bits, kind, group_size)
    experts, n = codes.shape[:2]
    cols = x.shape[-1]
    flat = x.reshape(-1, cols)
    flat = flat if flat.stride(-1) == 1 or cols == 1 else flat.contiguous()
    rows = flat.shape[0]
    out = x.new_zeros((*x.shape[:-1], n))
    if out.numel() == 0:
        return out
    if offsets is None:
        offsets = torch.arange(1, experts + 1, device=x.device, dtype=torch.int32) * x.shape[1]
    config = grouped(target_of(x.device), rows, experts, bits, flat.dtype == torch.float32)
    columns = block_columns(bits)
    # every expert may end with a tile that is not full
    most = rows // config.bm + min(experts, rows)
    grouped_gemm[(triton.cdiv(n, config.bn), most)](
        flat, codes, scale, scale if zero is None else zero, offsets.contiguous(), out, experts, n, cols, flat.stride(0),
        codes.shape[-1], triton.cdiv(cols, columns), scale.shape[-1], BITS=bits, KIND=kind, ZERO=zero_mode(zero),
        GROUP=group_size if group_size < cols else 0, EVEN=cols % columns == 0, BN=config.bn, BM=config.bm,
        EXPERTS=triton.next_power_of_2(experts), PRECISION=precision(flat.dtype, flat.device), HIP=target_of(x.device).hip,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
