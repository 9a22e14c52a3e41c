"""Rows of a packed weight as floats: all of them, for the vendor's matmul, or those that indices ask for (embedding)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.layouts.planes import block_columns
from qcompile.kernels.ops.rows_planes import check_dequantize, check_embedding
from qcompile.kernels.triton.decode import MAGIC, code_f32, float8_f16, float8_factor
from qcompile.kernels.triton.gemm import parameter

_ROWS = 16


@triton.jit
def decode_rows(
    index, codes, scale, zero, out, count, table, K, elements, groups,
    INDEXED: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of one block of K; grid ``(blocks, ceil(count / ROWS))``.

    INDEXED: the rows are ``index[...]`` of a table of ``table`` rows, and NaN where that is out of range.
    """
    RUNS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    COLUMNS: tl.constexpr = 32 * RUNS
    WIDTH: tl.constexpr = 96 if BITS == 3 else 32
    block = tl.program_id(0)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, 32)
    row = tl.minimum(place, count - 1).to(tl.int64)
    valid = place < count
    known = valid
    if INDEXED:
        row = tl.load(index + row).to(tl.int64)
        known = (row >= 0) & (row < table)
        row = tl.where(known, row, 0)
    at = codes + row[:, None] * elements + block * WIDTH + lane[None, :]
    even = tl.load(at)
    odd, high = even, even
    if BITS == 3:
        odd = tl.load(at + 32)
        high = tl.load(at + 64)
    for r in tl.static_range(RUNS):
        s = parameter(scale, row, block, groups, r, COLUMNS, GROUP).to(tl.float32)
        low = odd if r % 2 == 1 else even
        if KIND != "int":
            w = float8_f16(low, r, KIND).to(tl.float32) * float8_factor(KIND) * s
        elif ZERO == "shift":
            z = parameter(zero, row, block, groups, r, COLUMNS, GROUP).to(tl.float32)
            w = code_f32(low.to(tl.int32), high.to(tl.int32), 0, MAGIC, r, BITS) * s + z
        elif ZERO == "codes":
            z = parameter(zero, row, block, groups, r, COLUMNS, GROUP).to(tl.float32)
            w = code_f32(low.to(tl.int32), high.to(tl.int32), z, MAGIC, r, BITS) * s
        else:
            w = code_f32(low.to(tl.int32), high.to(tl.int32), 1 << (BITS - 1), MAGIC, r, BITS) * s
        if INDEXED:
            w = tl.where(known[:, None], w, float("nan"))
        column = block * COLUMNS + r * 32 + lane
        target = out + place.to(tl.int64)[:, None] * K + column[None, :]
        mask = valid[:, None] & (column < K)[None, :]
        if EVEN:
            mask = valid[:, None]
        tl.store(target, w.to(out.dtype.element_ty), mask=mask)


def dequantize_planes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """See :func:`qcompile.kernels.ops.rows_planes.dequantize_planes`."""
    check_dequantize(codes, scale, zero, bits, kind, group_size, cols, dtype)
    out = codes.new_empty((codes.shape[0], cols), dtype=dtype)
    _launch(None, codes, scale, zero, bits, kind, group_size, cols, out)
    return out


def embedding_planes(
    indices: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int,
    num_embeddings: int, embedding_dim: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See :func:`qcompile.kernels.ops.rows_planes.embedding_planes`; rows of NaN where an index is out of range."""
    check_embedding(indices, codes, scale, zero, bits, kind, group_size, num_embeddings, embedding_dim, dtype)
    out = codes.new_empty([*indices.shape, embedding_dim], dtype=dtype)
    flat = indices.reshape(-1).contiguous()
    _launch(flat, codes, scale, zero, bits, kind, group_size, embedding_dim, out.view(-1, embedding_dim))
    return out


def _launch(
    index: Tensor | None, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int,
    cols: int, out: Tensor,
) -> None:  # fmt: skip
    if out.numel() == 0:
        return
    count, columns = out.shape[0], block_columns(bits)
    mode = "none" if zero is None else "codes" if zero.dtype == torch.uint8 else "shift"
    decode_rows[(triton.cdiv(cols, columns), triton.cdiv(count, _ROWS))](
        codes if index is None else index, codes, scale, scale if zero is None else zero, out, count, codes.shape[0], cols,
        codes.shape[1], scale.shape[1], INDEXED=index is not None, BITS=bits, KIND=kind, ZERO=mode,
        GROUP=group_size if group_size < cols else 0, EVEN=cols % columns == 0, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
