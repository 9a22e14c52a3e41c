"""The ``tiled`` layout: one packed copy of a quantized matrix that serves every CPU loop, few rows or many.

A *tile* is 16 rows of the weight ``[N, K]``. ``K`` is cut into the groups of the scheme and each group is padded to a
multiple of 32: a *block* is 16 rows x 32 columns, stored as *cells* of 64 bytes, 16 lanes (one a row) of 4 bytes::

    8 bit   cell j: byte i of lane r = code[r, 4j + i]                       (chunk j, j = 0..7)
    4 bit   cell j: low nibble = chunk j, high nibble = chunk j + 4          (j = 0..3)
    2 bit   cell j: bits 2s, 2s+1 = chunk j + 2s,  s = 0..3                  (j = 0, 1)
    6 bit   cell j: low bits = chunk j; the top two of cells 0..2 = chunk 6, those of cells 3..5 = chunk 7
    5 bit   cell j: low bits = chunk j; the top three of all cells, in order = chunks 5, 6, 7
    3 bit   cell j: bits 0..2 = chunk j, 3..5 = chunk j + 3; the top two of all cells, in order = chunks 6, 7

So a block takes ``bits`` cells: a byte holds as many whole codes as fit, and the chunks that are left are a stream of bits
through what is left of the bytes (:func:`pieces`).

A cell is one AVX-512 register or two AVX2 registers, in which a 32-bit lane is always one row of the weight, and a
multiply-add of 4 bytes with 4 broadcast activations needs no horizontal sum. Scale and zero point lie beside it as
``[tiles, groups, 16]``. Padded rows get scale 0, padded columns meet activations that the kernels pad with 0.

The codes of a float8 are its own bytes, in a tensor of its dtype.

``Tiled`` is what ``qcompile::linear_tiled`` and its siblings take; :func:`unpack` gives back exactly what was packed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.kernels.layouts.logical import check_parts
from qcompile.kernels.memory import ask_for_large_pages

TILE = 16
"""Rows of the weight in one tile."""
BLOCK = 32
"""Columns of the weight in one block."""
WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that a code may have."""
CODES = (torch.uint8, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
"""What codes may be: unsigned integers, or the bytes of a float8."""
_LARGE_BYTES = 4 << 20  # of codes that are worth pages of megabytes
_CHUNK_BYTES = 1 << 15  # unpacked codes handled at a time: they stay in cache, and wake no other threads


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from ``in_features`` and ``group_size`` (0 = one group a row)."""

    in_features: int
    group_size: int
    groups: int
    blocks_per_group: int
    blocks: int

    @staticmethod
    def of(in_features: int, group_size: int) -> Geometry:
        size = group_size if 0 < group_size < in_features else in_features
        groups = -(-in_features // size) if size else 0
        per_group = -(-size // BLOCK)
        last = in_features - (groups - 1) * size
        blocks = (groups - 1) * per_group + -(-last // BLOCK) if groups else 0
        return Geometry(in_features, group_size, groups, per_group, blocks)

    def columns(self, device: torch.device | str = "cpu") -> Tensor:
        """The padded column of every logical column: int64 ``[in_features]``, strictly increasing."""
        k = torch.arange(self.in_features, device=device)
        size = self.group_size if 0 < self.group_size < self.in_features else max(self.in_features, 1)
        return k // size * (self.blocks_per_group * BLOCK) + k % size


@dataclass(frozen=True)
class Tiled:
    """A packed quantized matrix.

    codes: uint8 ``[tiles, blocks, 64 * bits]``, or a float8 dtype where the codes are such numbers; scale: float
    ``[tiles, groups, 16]``; zero: uint8 code units, or the scale's dtype in value units (*shift*), of the same shape, or
    None (symmetric: ``2 ** (bits - 1)``).
    rows, cols: the logical shape. parts: rows of each sibling stacked on ``N`` (each starts a tile). glu: the first
    half of the rows (gate) and the second (up) alternate tile by tile.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    rows: int
    cols: int
    parts: tuple[int, ...] | None = None
    glu: bool = False

    @property
    def nbytes(self) -> int:
        tensors = [self.codes, self.scale] + ([] if self.zero is None else [self.zero])
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Piece:
    """Bits ``to .. to + width - 1`` of the codes of ``count`` chunks from ``chunk`` on: they lie in as many cells from
    ``cell`` on, from bit ``start`` of each byte on."""

    chunk: int
    cell: int
    count: int
    start: int
    to: int
    width: int


@functools.cache
def pieces(bits: int) -> tuple[Piece, ...]:
    """Where the codes of a block of ``bits`` bits lie."""
    whole = 8 // bits * bits  # chunks that lie in one piece, and also the bits of a byte that they take
    found = [Piece(bits * s, 0, bits, bits * s, 0, bits) for s in range(8 // bits)]
    cell, start = 0, whole
    for chunk in range(whole, 8):
        to = 0
        while to < bits:
            width = min(8 - start, bits - to)
            found.append(Piece(chunk, cell, 1, start, to, width))
            to, start = to + width, start + width
            if start == 8:
                cell, start = cell + 1, whole
    return tuple(found)


def row_index(rows: int, parts: Sequence[int] | None, glu: bool) -> Tensor:
    """For each packed row the logical row it holds, -1 for padding: int64 ``[tiles * 16]``."""
    sections = list(parts) if parts is not None else [rows // 2, rows // 2] if glu else [rows]
    pieces, start = [], 0
    for size in sections:
        padded = -(-size // TILE) * TILE
        piece = torch.full((padded,), -1, dtype=torch.int64)
        piece[:size] = torch.arange(start, start + size)
        pieces.append(piece.view(-1, TILE))
        start += size
    return (torch.stack(pieces, 1) if glu else torch.cat(pieces)).reshape(-1)


def pack(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    parts: Sequence[int] | None = None,
    glu: bool = False,
) -> Tiled:
    """Pack codes ``[N, K]`` (uint8, each below ``2 ** bits``, or a float8) with scale and zero point ``[N, groups]``.

    group_size 0 is one group a row. parts lists the rows of siblings stacked on N; glu says that the first N/2 rows
    are the gate and the others the up projection. Raises ValueError when shapes, dtypes or values don't fit.
    """
    _check(codes, scale, zero, bits, group_size, parts, glu)
    n, k = codes.shape
    dtype, codes = codes.dtype, codes.view(torch.uint8)
    geometry = Geometry.of(k, group_size)
    index = row_index(n, parts, glu).to(codes.device)
    padded = geometry.blocks * BLOCK
    columns = None if padded == k else geometry.columns(codes.device)
    rows_are_padded = len(index) > n
    packed = codes.new_empty(len(index) // TILE, geometry.blocks, 64 * bits)
    if packed.is_cpu and packed.nbytes >= _LARGE_BYTES:
        ask_for_large_pages(packed)
    step = max(1, _CHUNK_BYTES // (TILE * padded))
    for start in range(0, len(packed), step):
        rows = index[start * TILE : (start + step) * TILE]
        chunk = codes.index_select(0, rows.clamp(min=0) if rows_are_padded else rows)
        if rows_are_padded:
            chunk *= (rows >= 0).to(torch.uint8)[:, None]
        if columns is not None:
            chunk = codes.new_zeros(len(rows), padded).index_copy_(1, columns, chunk)
        packed[start : start + step] = _pack_chunk(chunk, bits)
    return Tiled(
        packed.view(dtype),
        _tile_rows(scale, index),
        None if zero is None else _tile_rows(zero, index),
        bits,
        group_size,
        n,
        k,
        None if parts is None else tuple(int(p) for p in parts),
        glu,
    )


def unpack(tiled: Tiled) -> tuple[Tensor, Tensor, Tensor | None]:
    """The exact inverse of :func:`pack`: codes ``[N, K]``, scale ``[N, groups]``, zero ``[N, groups]`` or None."""
    index = row_index(tiled.rows, tiled.parts, tiled.glu).to(tiled.codes.device)
    kept = torch.nonzero(index >= 0).reshape(-1)
    # packed position of logical row 0, 1, 2 ...
    position = torch.empty_like(kept)
    position[index[kept]] = kept
    codes = unpack_codes(tiled.codes.view(torch.uint8), tiled.bits, tiled.group_size, tiled.cols)[position]
    zero = None if tiled.zero is None else untile_rows(tiled.zero)[position]
    return codes.view(tiled.codes.dtype), untile_rows(tiled.scale)[position], zero


def unpack_codes(packed: Tensor, bits: int, group_size: int, cols: int) -> Tensor:
    """Codes in packed row order, padding rows included: ``[tiles * 16, cols]``, of the dtype that they were packed as."""
    tiles, blocks, _ = packed.shape
    dtype, packed = packed.dtype, packed.view(torch.uint8)
    cells = packed.reshape(tiles, blocks, bits, TILE, 4)
    chunks = packed.new_zeros(tiles, blocks, 8, TILE, 4)
    for p in pieces(bits):
        part = (cells[:, :, p.cell : p.cell + p.count] >> p.start) & (2**p.width - 1)
        chunks[:, :, p.chunk : p.chunk + p.count] |= part << p.to
    # rows first, then block, chunk, byte
    matrix = chunks.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, blocks * BLOCK)
    return matrix[:, Geometry.of(cols, group_size).columns(packed.device)].view(dtype)


def untile_rows(tiled: Tensor) -> Tensor:
    """``[tiles, groups, 16]`` -> ``[tiles * 16, groups]``."""
    return tiled.permute(0, 2, 1).reshape(tiled.shape[0] * TILE, tiled.shape[1])


def _tile_rows(values: Tensor, index: Tensor) -> Tensor:
    picked = values[index.clamp(min=0)]
    picked[index < 0] = 0
    return picked.view(-1, TILE, values.shape[1]).permute(0, 2, 1).contiguous()


def _pack_chunk(chunk: Tensor, bits: int) -> Tensor:
    """uint8 ``[tiles * 16, blocks * 32]`` -> ``[tiles, blocks, 64 * bits]``."""
    tiles, blocks = chunk.shape[0] // TILE, chunk.shape[1] // BLOCK
    # The four bytes of a lane move together: as one word.
    words = chunk.view(torch.int32).view(tiles, TILE, blocks * 8).transpose(1, 2).contiguous()
    chunks = words.view(torch.uint8).view(tiles, blocks, 8, 64)
    cells = chunk.new_zeros(tiles, blocks, bits, 64)
    for p in pieces(bits):
        part = chunks[:, :, p.chunk : p.chunk + p.count]
        if p.width < bits:
            part = (part >> p.to) & (2**p.width - 1)
        cells[:, :, p.cell : p.cell + p.count] |= part << p.start if p.start else part
    return cells.view(tiles, blocks, 64 * bits)


def _check(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    parts: Sequence[int] | None,
    glu: bool,
) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"bits={bits}: the tiled layout stores codes of {', '.join(map(str, WIDTHS))} bits")
    if codes.dim() != 2 or codes.dtype not in CODES:
        raise ValueError(f"codes must be uint8 or a float8 [N, K], got {codes.dtype} {list(codes.shape)}")
    if codes.dtype != torch.uint8 and (bits != 8 or zero is not None):
        raise ValueError(f"float8 codes have 8 bits and no zero point, got bits={bits}, zero={zero is not None}")
    n, k = codes.shape
    if n == 0 or k == 0:
        raise ValueError(f"codes must not be empty, got {list(codes.shape)}")
    if group_size < 0:
        raise ValueError(f"group_size={group_size}: give a positive size, or 0 for one group a row")
    groups = Geometry.of(k, group_size).groups
    if tuple(scale.shape) != (n, groups):
        raise ValueError(
            f"scale must be [{n}, {groups}] for codes {[n, k]} in groups of {group_size}, got {list(scale.shape)}"
        )
    check_parts(scale, zero)
    if bits < 8 and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes reach {int(codes.max())}, which does not fit {bits} bits (at most {2**bits - 1})")
    if parts is not None and (glu or sum(parts) != n or min(parts, default=0) < 1):
        raise ValueError(f"parts={list(parts)} must be positive, add up to N={n}, and not come with glu")
    if glu and n % 2:
        raise ValueError(f"glu needs as many gate as up rows, got N={n}")
