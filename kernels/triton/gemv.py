"""``y = x @ W.T`` for one or two rows of x: bandwidth is all, so each weight is read once, 16 bytes a thread, and decoded
in registers.

A warp reads consecutive blocks of one row of W; activations lie in the same registers (tiles ``[rows, blocks, 32]`` and
``[1, blocks, 32]`` get equal layouts), so the loop over K has no shuffle and no barrier; sums cross lanes once, after it.
K is cut among ``SPLIT`` programs; their sums meet in ``finish.py``.
"""

import triton
import triton.language as tl

from qcompile.kernels.triton.decode import byte_f32, code_f32, float8_f16, float8_factor, float8_pairs


@triton.jit
def _parameter(part, row, block, groups, RUN: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Scale or zero point of a run: ``[rows, blocks, 1]``, or ``[rows, blocks, 32]`` where a run has several."""
    if GROUP == 0:
        at = row[:, None, None]
    elif GROUP % 32 == 0:
        at = row[:, None, None] * groups + tl.minimum((block * COLUMNS + RUN * 32) // GROUP, groups - 1)[None, :, None]
    else:
        column = block[:, None] * COLUMNS + RUN * 32 + tl.arange(0, 32)[None, :]
        at = row[:, None, None] * groups + tl.minimum(column // GROUP, groups - 1)[None, :, :]
    return tl.load(part + at).to(tl.float32)


@triton.jit
def _activations(x, block, last, K, RUN: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """One run of a row of x: float32 ``[1, blocks, 32]``, zeros beyond K."""
    column = block[:, None] * COLUMNS + RUN * 32 + tl.arange(0, 32)[None, :]
    mask = (block < last)[:, None]
    if not EVEN:
        mask = mask & (column < K)
    return tl.load(x + column[None, :, :], mask=mask[None, :, :], other=0.0).to(tl.float32)


@triton.jit
def dot_rows(
    x, codes, scale, zero, row, K, x_stride, elements, blocks, groups, first, last, magic,
    ROWS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    BB: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``W[row] @ x[0]`` and ``W[row] @ x[1]``, float32 ``[rows]``, over the blocks ``first`` to ``last`` of K.

    row: int64, of rows that exist. ROWS: 1 or 2; with 1 the second result is 0. BB: blocks of W at a time. WORDS: elements
    are read two by two, for ``float8_pairs`` and ``byte_f32``; magic: see ``table.words``.
    """
    RUNS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    COLUMNS: tl.constexpr = 32 * RUNS
    WIDTH: tl.constexpr = 96 if BITS == 3 else 32
    BN: tl.constexpr = row.shape[0]
    # runs of a block that share a scale
    SHARED: tl.constexpr = RUNS if GROUP % COLUMNS == 0 else (
        GROUP // 32 if GROUP % 32 == 0 and COLUMNS % GROUP == 0 else 1
    )  # fmt: skip
    sum0 = tl.zeros((BN, BB, 32), tl.float32)
    sum1 = tl.zeros((BN, BB, 32), tl.float32)
    for start in range(first, last, BB):
        block = start + tl.arange(0, BB)
        inside = (block < last)[None, :, None]
        if WORDS:
            words = codes.to(tl.pointer_type(tl.int32), bitcast=True) + row[:, None, None] * (elements // 2)
            at = words + ((block * (WIDTH // 2))[:, None] + tl.arange(0, 16)[None, :])[None, :, :]
        else:
            at = codes + row[:, None, None] * elements + ((block * WIDTH)[:, None] + tl.arange(0, 32)[None, :])[None, :, :]
        even = tl.load(at, mask=inside, other=0)
        odd, high = even, even
        if BITS == 3:
            odd = tl.load(at + (16 if WORDS else 32), mask=inside, other=0)
            high = tl.load(at + (32 if WORDS else 64), mask=inside, other=0)
        known = tl.minimum(block, blocks - 1)  # where it is safe to read scales
        for r in tl.static_range(RUNS):
            if r % SHARED == 0:
                part0 = tl.zeros((BN, BB, 32), tl.float32)
                part1 = tl.zeros((BN, BB, 32), tl.float32)
                if GROUP != 0 or ZERO == "shift":
                    s = _parameter(scale, row, known, groups, r, COLUMNS, GROUP)
                if ZERO != "none":
                    z = _parameter(zero, row, known, groups, r, COLUMNS, GROUP)
                else:
                    z = 1 << (BITS - 1)
            low = odd if r % 2 == 1 else even
            if WORDS and KIND != "int":
                w = float8_pairs(low, r, KIND, tl.float16).to(tl.float32)
            elif WORDS and ZERO == "shift":
                w = byte_f32(low, high, 0, magic, r, BITS) * s + z
            elif WORDS:
                w = byte_f32(low, high, z, magic, r, BITS)
            elif KIND != "int":
                w = float8_f16(low, r, KIND).to(tl.float32)
            elif ZERO == "shift":
                w = code_f32(low.to(tl.int32), high.to(tl.int32), 0, magic, r, BITS) * s + z
            else:
                w = code_f32(low.to(tl.int32), high.to(tl.int32), z, magic, r, BITS)
            part0 += w * _activations(x, block, last, K, r, COLUMNS, EVEN)
            if ROWS == 2:
                part1 += w * _activations(x + x_stride, block, last, K, r, COLUMNS, EVEN)
            if (r + 1) % SHARED == 0:
                if GROUP != 0 and ZERO != "shift":
                    part0 *= s
                    part1 *= s
                sum0 += part0
                if ROWS == 2:
                    sum1 += part1
    factor = float8_factor(KIND) if KIND != "int" else 1.0
    if GROUP == 0 and ZERO != "shift":
        factor *= tl.load(scale + row).to(tl.float32)
    return tl.sum(tl.sum(sum0, 2), 1) * factor, tl.sum(tl.sum(sum1, 2), 1) * factor


@triton.jit
def gemv(
    x, codes, scale, zero, out, N, K, x_stride, elements, blocks, groups, blocks_per_split, magic,
    ROWS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Partial sums float32 ``[SPLIT, ROWS, N]`` of ``ROWS`` (1 or 2) rows of x.

    Grid ``(ceil(N / BN), SPLIT)``. KIND: ``int`` or a float8's name. ZERO: ``none``, ``codes`` or ``shift``. GROUP: columns
    that share a scale, 0 = a whole row. BN: rows of W a program; BB: blocks of it at a time. EVEN: K is a whole number of
    blocks. WORDS, magic: what ``table.words`` says.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * blocks_per_split
    sum0, sum1 = dot_rows(
        x, codes, scale, zero, tl.minimum(row, N - 1).to(tl.int64), K, x_stride, elements, blocks, groups, first,
        tl.minimum(first + blocks_per_split, blocks), magic, ROWS, BITS, KIND, ZERO, GROUP, BB, EVEN, WORDS,
    )  # fmt: skip
    place = out + tl.program_id(1) * ROWS * N + row
    tl.store(place, sum0, mask=row < N)
    if ROWS == 2:
        tl.store(place + N, sum1, mask=row < N)
