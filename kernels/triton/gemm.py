"""``y = x @ W.T`` on tensor cores, weights decoded in registers: from a few rows (K cut among programs) to many.

W is the left operand, ``acc[rows of W, rows of x]``, so that the few rows of a decoding step fill the short side of the
tensor core's tile. Each run of 32 columns is one product of depth 32.
"""

import triton
import triton.language as tl

from qcompile.kernels.triton.decode import (
    MAGIC,
    code_bf16,
    code_f16,
    code_f32,
    cut_bf16,
    float8_f16,
    float8_factor,
    float8_pairs,
    split_words,
)
from qcompile.kernels.triton.finish import activate


@triton.jit
def parameter(part, row, block, groups, RUN: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Scale or zero point of a run of one block: ``[rows, 1]``, or ``[rows, 32]`` where a run has several."""
    if GROUP == 0:
        at = row[:, None]
    elif GROUP % 32 == 0:
        at = row[:, None] * groups + tl.minimum((block * COLUMNS + RUN * 32) // GROUP, groups - 1)
    else:
        column = block * COLUMNS + RUN * 32 + tl.arange(0, 32)
        at = row[:, None] * groups + tl.minimum(column // GROUP, groups - 1)[None, :]
    return tl.load(part + at)


@triton.jit
def code_values(
    low, high, z, dtype: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    HIP: tl.constexpr = False,
):  # fmt: skip
    """``code - zero`` of a run, ``[rows, 32]`` in ``dtype`` and exact there; a float8 still wants its ``float8_factor``.

    HIP: AMD's parts before gfx950 have no bfloat16 arithmetic; what is exact in float32 is cut off there.
    """
    if KIND == "finite_e4m3fn" or KIND == "finite_e4m3fnuz" or KIND == "finite_e5m2":
        if dtype == tl.bfloat16 and HIP:
            return cut_bf16(float8_pairs(low, RUN, KIND, tl.float16).to(tl.float32))
        elif dtype == tl.bfloat16:
            return float8_pairs(low, RUN, KIND, dtype)
        else:
            return float8_pairs(low, RUN, KIND, tl.float16).to(dtype)
    elif KIND != "int":
        return float8_f16(split_words(low), RUN, KIND).to(dtype)
    elif dtype == tl.bfloat16 and HIP:
        return cut_bf16(wide_values(low, high, z, RUN, BITS, KIND, ZERO))
    elif dtype == tl.float16:
        return code_f16(low, high, z.to(dtype) if ZERO == "codes" else 1 << (BITS - 1), RUN, BITS)
    elif dtype == tl.bfloat16 and BITS < 8:
        return code_bf16(low, high, z.to(dtype) if ZERO == "codes" else 1 << (BITS - 1), RUN, BITS)
    else:
        return wide_values(low, high, z, RUN, BITS, KIND, ZERO).to(dtype)


@triton.jit
def wide_values(low, high, z, RUN: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr):
    """``code - zero`` of a run (the bare code where the zero point is a shift) as float32 ``[rows, 32]``."""
    if KIND == "finite_e4m3fn" or KIND == "finite_e4m3fnuz" or KIND == "finite_e5m2":
        return float8_pairs(low, RUN, KIND, tl.float16).to(tl.float32) * float8_factor(KIND)
    elif KIND != "int":
        return float8_f16(split_words(low), RUN, KIND).to(tl.float32) * float8_factor(KIND)
    even = split_words(low).to(tl.int32)
    odd = split_words(high).to(tl.int32) if BITS == 3 else even
    if ZERO == "shift":
        return code_f32(even, odd, 0, MAGIC, RUN, BITS)
    elif ZERO == "codes":
        return code_f32(even, odd, z.to(tl.float32), MAGIC, RUN, BITS)
    else:
        return code_f32(even, odd, 1 << (BITS - 1), MAGIC, RUN, BITS)


@triton.jit
def accumulate(
    acc, x, codes, scale, zero, row, x_row, K, x_stride, elements, groups, first, last,
    BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, HIP: tl.constexpr = False, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """``acc + W[row] @ x[x_row].T`` over the blocks ``first`` to ``last`` of K, without ``row_scale``.

    PARTS: steps that a block is taken in, each of which reads the words again and shifts its own fields down to the first
    place: the activations of a whole block of 2- or 3-bit codes are too many to be held for many rows.

    row, x_row: int64, of rows that exist. Three ways to bring the scale in: a row's single one is left to the end; where a
    run has one scale and there are few rows of x, products of exact codes are scaled, in float32, as they are added up; else
    it goes into the weight, which is rounded to the dtype of x once.
    """
    RUNS: tl.constexpr = (16 if BITS == 3 else 16 // BITS) // PARTS
    COLUMNS: tl.constexpr = 32 * RUNS
    WIDTH: tl.constexpr = 48 if BITS == 3 else 16  # words
    LOW: tl.constexpr = RUNS if BITS == 3 else BITS * RUNS  # bits of a part in a word
    SHARED: tl.constexpr = RUNS if GROUP % COLUMNS == 0 else (
        GROUP // 32 if GROUP % 32 == 0 and COLUMNS % GROUP == 0 else 1
    )  # fmt: skip
    SCALED: tl.constexpr = GROUP != 0 or ZERO == "shift"
    AFTER: tl.constexpr = SCALED and GROUP % 32 == 0 and ZERO != "shift" and acc.shape[1] <= (128 if HIP else 32) * SHARED
    dtype: tl.constexpr = x.dtype.element_ty
    lane = tl.arange(0, 32)
    words = codes.to(tl.pointer_type(tl.int32), bitcast=True)
    code_rows = words + row[:, None] * (elements // 2) + tl.arange(0, 16)[None, :]
    x_rows = x + x_row[None, :] * x_stride + lane[:, None]
    for block in range(first * PARTS, last * PARTS):
        place = code_rows + block // PARTS * WIDTH
        even = tl.load(place)
        odd, high = even, even
        if BITS == 3:
            odd, high = tl.load(place + 16), tl.load(place + 32)
        if PARTS > 1:
            even = even >> block % PARTS * LOW
            odd, high = (odd >> block % PARTS * LOW, high >> block % PARTS * RUNS) if BITS == 3 else (even, even)
        for r in tl.static_range(RUNS):
            if r % SHARED == 0:
                s, z = 1.0, 0.0
                if SCALED:
                    s = parameter(scale, row, block, groups, r, COLUMNS, GROUP).to(tl.float32)
                if ZERO != "none":
                    z = parameter(zero, row, block, groups, r, COLUMNS, GROUP)
                if AFTER:
                    part = tl.zeros(acc.shape, tl.float32)
            low = odd if r % 2 == 1 else even
            if SCALED and not AFTER:
                w = wide_values(low, high, z, r, BITS, KIND, ZERO) * s
                if ZERO == "shift":
                    w += z.to(tl.float32)
                w = w.to(dtype)
            else:
                w = code_values(low, high, z, dtype, r, BITS, KIND, ZERO, HIP)
            start = block * COLUMNS + r * 32
            if EVEN:
                a = tl.load(x_rows + start)
            else:
                a = tl.load(x_rows + start, mask=(start + lane < K)[:, None], other=0.0)
            if AFTER:
                part = tl.dot(w, a, part, input_precision=PRECISION)
                if (r + 1) % SHARED == 0:
                    acc += part * (s * float8_factor(KIND))
            else:
                acc = tl.dot(w, a, acc, input_precision=PRECISION)
    return acc


@triton.jit
def row_scale(acc, scale, row, KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr):
    """What :func:`accumulate` leaves to the end: the scale of rows that have one."""
    if GROUP == 0 and ZERO != "shift":
        acc *= (tl.load(scale + row).to(tl.float32) * float8_factor(KIND))[:, None]
    return acc


@triton.jit
def tile_of(tile, M, N, BN: tl.constexpr, BM: tl.constexpr, PANEL: tl.constexpr):
    """The first row of W and the first row of x of a tile.

    PANEL: tiles of W that go through all of x together, so that both stay in the L2 cache.
    """
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    panel = tile // (PANEL * tiles_m)
    width = tl.minimum(tiles_n - panel * PANEL, PANEL)
    in_panel = tile % (PANEL * tiles_m)
    return (panel * PANEL + in_panel % width) * BN, in_panel // width * BM


@triton.jit
def gemm(
    x, codes, scale, zero, bias, mul, add, out, M, N, K, x_stride, elements, blocks, groups, blocks_per_split,
    BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, PANEL: tl.constexpr, WHOLE: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MUL: tl.constexpr, HAS_ADD: tl.constexpr, PRECISION: tl.constexpr, HIP: tl.constexpr = False,
    PARTS: tl.constexpr = 1,
):  # fmt: skip
    """A tile ``[BM, BN]`` of y; grid ``(ceil(N / BN) * ceil(M / BM), SPLIT)``.

    WHOLE: nothing is split, and bias, activation, product and residual are applied here; out is y ``[M, N]``. Otherwise out
    is float32 ``[SPLIT, M, N]``. PANEL: see :func:`tile_of`.
    """
    first_n, first_m = tile_of(tl.program_id(0), M, N, BN, BM, PANEL)
    n, m = first_n + tl.arange(0, BN), first_m + tl.arange(0, BM)
    row, x_row = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    first = tl.program_id(1) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)
    acc = accumulate(
        tl.zeros((BN, BM), tl.float32), x, codes, scale, zero, row, x_row, K, x_stride, elements, groups, first, last,
        BITS, KIND, ZERO, GROUP, EVEN, PRECISION, HIP, PARTS,
    )  # fmt: skip
    acc = row_scale(acc, scale, row, KIND, ZERO, GROUP)
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if WHOLE:
        if HAS_BIAS:
            acc += tl.load(bias + row).to(tl.float32)[:, None]
        acc = activate(acc, ACTIVATION)
        if HAS_MUL:
            acc *= tl.load(mul + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADD:
            acc += tl.load(add + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + tl.program_id(1).to(tl.int64) * M * N + at, acc, mask=mask)
