"""int8 x int8 and float8 x float8 on tensor cores, with a scale for each row of x and each row of W.

Weights are read as they are stored, ``[N, K]`` with K contiguous: one byte a code needs no layout of its own. int8 products
are summed exactly, in int32. Where tensor cores do not know a float8, both sides are decoded to float16, which holds its
every value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.ops.linear import linear_quantized as reference
from qcompile.kernels.scheme import PerChannel, PerGroup, PerTensor, Scheme
from qcompile.kernels.triton.decode import float8_f16, float8_factor
from qcompile.kernels.triton.finish import finish
from qcompile.kernels.triton.table import quantized as configuration
from qcompile.kernels.triton.target import target_of


@triton.jit
def _operand(codes, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Codes as the tensor core takes them; not native float8 come as int8 and leave as float16."""
    if NATIVE:
        return codes
    else:
        return float8_f16(codes.to(tl.int16), 0, KIND)


@triton.jit
def quantized_gemm(
    x, x_scale, w, w_scale, bias, out, M, N, K, x_stride, w_stride, steps_per_split,
    X_KIND: tl.constexpr, W_KIND: tl.constexpr, NATIVE: tl.constexpr, X_ROWS: tl.constexpr, W_ROWS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PANEL: tl.constexpr,
):  # fmt: skip
    """A tile of y; grid ``(tiles, SPLIT)``. Without WHOLE, out is float32 ``[SPLIT, M, N]``, to be summed.

    X_KIND, W_KIND: ``int`` or a float8's name. X_ROWS, W_ROWS: whether each row has its scale, or all have one.
    """
    tile = tl.program_id(0)
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    panel = tile // (PANEL * tiles_m)
    width = tl.minimum(tiles_n - panel * PANEL, PANEL)
    in_panel = tile % (PANEL * tiles_m)
    n = (panel * PANEL + in_panel % width) * BN + tl.arange(0, BN)
    m = in_panel // width * BM + tl.arange(0, BM)
    row, x_row = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    lane = tl.arange(0, BK)
    w_rows = w + row[:, None] * w_stride + lane[None, :]
    x_rows = x + x_row[None, :] * x_stride + lane[:, None]
    kind: tl.constexpr = tl.int32 if W_KIND == "int" else tl.float32
    acc = tl.zeros((BN, BM), kind)
    first = tl.program_id(1) * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, BK))
    for step in range(first, last):
        if EVEN:
            a, b = tl.load(w_rows + step * BK), tl.load(x_rows + step * BK)
        else:
            inside = step * BK + lane < K
            a = tl.load(w_rows + step * BK, mask=inside[None, :], other=0)
            b = tl.load(x_rows + step * BK, mask=inside[:, None], other=0)
        # Hopper's float8 sums keep 14 bits: they are added up in float32 every BK columns
        acc = tl.dot(_operand(a, W_KIND, NATIVE), _operand(b, X_KIND, NATIVE), acc, max_num_imprecise_acc=BK, out_dtype=kind)
    y = acc.to(tl.float32)
    s = tl.load(w_scale + (row if W_ROWS else row * 0)).to(tl.float32)
    t = tl.load(x_scale + (x_row if X_ROWS else x_row * 0)).to(tl.float32)
    if not NATIVE:
        s *= float8_factor(W_KIND) * float8_factor(X_KIND)
    y = y * s[:, None] * t[None, :]
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if WHOLE:
        if HAS_BIAS:
            y += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + tl.program_id(1).to(tl.int64) * M * N + at, y, mask=mask)


def linear_quantized(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See :func:`qcompile.kernels.ops.linear.linear_quantized`, which also takes what is not one scale a row or less."""
    left, right = Scheme.parse(x_scheme), Scheme.parse(scheme)
    by_token = isinstance(left.granularity, PerGroup) and left.granularity.size >= shape[-1]
    by_row = right.granularity == PerChannel(0)
    fits = (by_token or left.granularity == PerTensor()) and (by_row or right.granularity == PerTensor())
    if not fits or dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.shape[-1:] != (shape[-1],):
        return reference(x, x_scale, data, scale, bias, x_scheme, scheme, shape, dtype)
    kinds = [str(s.qtype.dtype).removeprefix("torch.float8_") if s.qtype.is_float else "int" for s in (left, right)]
    target = target_of(x.device)
    native = kinds == ["int", "int"] or (kinds[0] == kinds[1] and kinds[0] in target.float8)
    out = x.new_empty((*x.shape[:-1], shape[0]), dtype=dtype)
    if out.numel() == 0:
        return out
    flat, n, cols = x.reshape(-1, shape[1]).contiguous(), shape[0], shape[1]
    rows, weight = flat.shape[0], data.contiguous()
    if not native:
        flat, weight = flat.view(torch.int8), weight.view(torch.int8)
    config, split = configuration(target, rows, n, cols, native)
    steps = triton.cdiv(cols, config.bk)
    whole = split == 1
    target_out = out if whole else flat.new_empty((split, rows, n), dtype=torch.float32)
    grid = (triton.cdiv(n, config.bn) * triton.cdiv(rows, config.bm), split)
    quantized_gemm[grid](
        flat, x_scale.contiguous(), weight, scale.contiguous(), scale if bias is None else bias, target_out, rows, n, cols,
        flat.stride(0), weight.stride(0), triton.cdiv(steps, split), X_KIND=kinds[0], W_KIND=kinds[1], NATIVE=native,
        X_ROWS=by_token, W_ROWS=by_row, BN=config.bn, BM=config.bm, BK=config.bk, EVEN=cols % config.bk == 0, WHOLE=whole,
        HAS_BIAS=bias is not None, PANEL=8, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if not whole:
        finish[(rows, triton.cdiv(n, 512))](
            target_out, target_out if bias is None else bias, out, out, out, n, n, 0, rows * n, SPLIT=split,
            ACTIVATION="none", GLU=False, HAS_BIAS=bias is not None, HAS_MUL=False, HAS_ADD=False, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return out
