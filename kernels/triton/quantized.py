"""int8 x int8 and float8 x float8 on tensor cores, with a scale for each row of x, and for each row or group of W.

Weights are read as they are stored, ``[N, K]`` with K contiguous: one byte a code needs no layout of its own. int8 products
are summed exactly, in int32. Where tensor cores do not know a float8, both sides are decoded to float16, which holds its
every value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.layouts.logical import group_size
from qcompile.kernels.ops import linear_quantized as reference
from qcompile.kernels.scheme import PerTensor, Scheme
from qcompile.kernels.triton.decode import float8_f16, float8_factor
from qcompile.kernels.triton.finish import activate, add_parts
from qcompile.kernels.triton.gemm import tile_of
from qcompile.kernels.triton.register_codes import fits, kinds_of
from qcompile.kernels.triton.table import PANEL
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
def scaled_products(
    x, x_scale, w, w_scale, row, x_row, K, x_stride, w_stride, groups, first, last,
    X_KIND: tl.constexpr, W_KIND: tl.constexpr, NATIVE: tl.constexpr, X_ROWS: tl.constexpr, W_ROWS: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``W[row] @ x[x_row].T`` in float32, scales included, over the steps ``first`` to ``last`` of K.

    row, x_row: int64, of rows that exist. X_KIND, W_KIND: ``int`` or a float8's name. X_ROWS, W_ROWS: whether each row has
    its scale, or all have one. GROUP: columns of W that share a scale, 0 = a whole row; a multiple of BK. A step is RUNS
    products of depth BK.
    """
    lane = tl.arange(0, BK)
    w_rows = w + row[:, None] * w_stride + lane[None, :]
    x_rows = x + x_row[None, :] * x_stride + lane[:, None]
    kind: tl.constexpr = tl.int32 if W_KIND == "int" else tl.float32
    acc = tl.zeros((row.shape[0], x_row.shape[0]), tl.float32 if GROUP != 0 else kind)
    for step in range(first, last):
        for r in tl.static_range(RUNS):
            start = (step * RUNS + r) * BK
            if EVEN:
                a, b = tl.load(w_rows + start), tl.load(x_rows + start)
            else:
                inside = start + lane < K
                a = tl.load(w_rows + start, mask=inside[None, :], other=0.0)
                b = tl.load(x_rows + start, mask=inside[:, None], other=0.0)
            a, b = _operand(a, W_KIND, NATIVE), _operand(b, X_KIND, NATIVE)
            # Hopper's float8 sums keep 14 bits: they are added up in float32 every BK columns
            if GROUP == 0:
                acc = tl.dot(a, b, acc, max_num_imprecise_acc=BK, out_dtype=kind)
            else:
                part = tl.dot(a, b, max_num_imprecise_acc=BK, out_dtype=kind)
                s = tl.load(w_scale + row * groups + tl.minimum(start // GROUP, groups - 1)).to(tl.float32)
                acc += part.to(tl.float32) * s[:, None]
    y = acc.to(tl.float32)
    t = tl.load(x_scale + (x_row if X_ROWS else x_row * 0)).to(tl.float32)
    if not NATIVE:
        t *= float8_factor(W_KIND) * float8_factor(X_KIND)
    if GROUP == 0:
        y *= tl.load(w_scale + (row if W_ROWS else row * 0)).to(tl.float32)[:, None]
    return y * t[None, :]


@triton.jit
def quantized_gemm(
    x, x_scale, w, w_scale, bias, mul, add, out, M, N, K, x_stride, w_stride, groups, steps_per_split,
    X_KIND: tl.constexpr, W_KIND: tl.constexpr, NATIVE: tl.constexpr, X_ROWS: tl.constexpr, W_ROWS: tl.constexpr,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MUL: tl.constexpr, HAS_ADD: tl.constexpr,
    PANEL: tl.constexpr,
):  # fmt: skip
    """A tile of y; grid ``(tiles, SPLIT)``. Without WHOLE, out is float32 ``[SPLIT, M, N]``, to be summed.

    The other constants are those of :func:`scaled_products`.
    """
    first_n, first_m = tile_of(tl.program_id(0), M, N, BN, BM, PANEL)
    n, m = first_n + tl.arange(0, BN), first_m + tl.arange(0, BM)
    row, x_row = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    first = tl.program_id(1) * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, BK * RUNS))
    y = scaled_products(
        x, x_scale, w, w_scale, row, x_row, K, x_stride, w_stride, groups, first, last, X_KIND, W_KIND, NATIVE, X_ROWS,
        W_ROWS, GROUP, BK, RUNS, EVEN,
    )  # fmt: skip
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if WHOLE:
        if HAS_BIAS:
            y += tl.load(bias + row).to(tl.float32)[:, None]
        y = activate(y, ACTIVATION)
        if HAS_MUL:
            y *= tl.load(mul + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADD:
            y += tl.load(add + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + tl.program_id(1).to(tl.int64) * M * N + at, y, mask=mask)


def linear_quantized(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], dtype: torch.dtype, activation: str = "none", mul: Tensor | None = None,
    add: Tensor | None = None, glu: bool = False,
) -> Tensor:  # fmt: skip
    """See :func:`qcompile.kernels.ops.linear_quantized.linear_quantized`, which also takes what this one refuses."""
    if not fits(x_scheme, scheme, shape, dtype):
        return reference.linear_quantized(
            x, x_scale, data, scale, bias, x_scheme, scheme, shape, dtype, activation, mul, add, glu
        )
    reference.check_product(x, x_scale, data, scale, x_scheme, scheme, shape)
    reference.check_epilogue(x, shape, dtype, activation, mul, add, glu)
    out = x.new_empty((*x.shape[:-1], shape[0] // 2 if glu else shape[0]), dtype=dtype)
    if out.numel() == 0:
        return out
    mul, add = (None if t is None else t.contiguous() for t in (mul, add))
    epilogue = None if glu else (bias, mul, add, activation)
    partial = _products(x, x_scale, data, scale, x_scheme, scheme, out, epilogue)
    if partial is not None:
        add_parts(partial, out.view(-1, out.shape[-1]), 0, bias, mul, add, activation, glu)
    return out


def linear_quantized_split(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], dtype: torch.dtype, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """See :func:`qcompile.kernels.ops.linear_quantized.linear_quantized_split`, which also takes what this one refuses."""
    if not fits(x_scheme, scheme, shape, dtype):
        return reference.linear_quantized_split(x, x_scale, data, scale, bias, x_scheme, scheme, shape, dtype, sizes)
    reference.check_product(x, x_scale, data, scale, x_scheme, scheme, shape)
    reference.check_sizes(shape, sizes)
    outs = [x.new_empty((*x.shape[:-1], size), dtype=dtype) for size in sizes]
    if x.shape[:-1].numel() == 0:
        return outs
    partial = _products(x, x_scale, data, scale, x_scheme, scheme, None, None)
    first = 0
    for out in outs:
        if partial is not None:
            add_parts(partial, out.view(-1, out.shape[-1]), first, bias, None, None, "none", False)
        first += out.shape[-1]
    return outs


_Epilogue = tuple[Tensor | None, Tensor | None, Tensor | None, str]


def _products(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, x_scheme: str, scheme: str, out: Tensor | None,
    epilogue: _Epilogue | None,
) -> Tensor | None:  # fmt: skip
    """float32 ``[split, M, N]`` that add up to the product; None where ``out`` holds the result already.

    That it may only where there is an ``epilogue``, and K is not split.
    """
    left, right = Scheme.parse(x_scheme), Scheme.parse(scheme)
    target, (n, cols) = target_of(x.device), data.shape
    *kinds, native = kinds_of(left, right, target)
    flat, weight = x.reshape(-1, cols).contiguous(), data.contiguous()
    rows, group = flat.shape[0], group_size(right, cols)
    if not native:
        flat, weight = flat.view(torch.int8), weight.view(torch.int8)
    config, split, runs = configuration(target, rows, n, cols, native, group)
    bias, mul, add, activation = epilogue or (None, None, None, "none")
    whole = split == 1 and epilogue is not None and out is not None
    into = out if whole and out is not None else flat.new_empty((split, rows, n), dtype=torch.float32)
    step = config.bk * runs
    grid = (triton.cdiv(n, config.bn) * triton.cdiv(rows, config.bm), split)
    quantized_gemm[grid](
        flat, x_scale.contiguous(), weight, scale.contiguous(), scale if bias is None else bias,
        into if mul is None else mul, into if add is None else add, into, rows, n, cols, flat.stride(0), weight.stride(0),
        scale.shape[-1] if group else 1, triton.cdiv(triton.cdiv(cols, step), split), X_KIND=kinds[0], W_KIND=kinds[1],
        NATIVE=native, X_ROWS=left.granularity != PerTensor(), W_ROWS=right.granularity != PerTensor(), GROUP=group,
        BN=config.bn, BM=config.bm, BK=config.bk, RUNS=runs, EVEN=cols % step == 0, WHOLE=whole, ACTIVATION=activation,
        HAS_BIAS=whole and bias is not None, HAS_MUL=mul is not None, HAS_ADD=add is not None, PANEL=PANEL,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return None if whole else into
