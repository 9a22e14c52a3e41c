"""The ``planes`` layout: one packed copy of a quantized matrix for GPUs, read by GEMV and GEMM, Triton and CUDA C++ alike.

A row of the weight ``[N, K]`` is cut into *blocks*, and a block into *runs* of 32 consecutive columns. Codes lie in 16-bit
*elements*; 32 of them make a *plane row*, and run r of a block is bit field r of all 32 elements::

    4 bit, one block of one row: 128 columns in 32 elements (64 bytes)

                 bit 15   12 11    8 7     4 3     0
    element  0      | k=96  | k=64  | k=32  | k=0   |      run 0 = bits 0..3   = columns   0 ..  31
    element  1      | k=97  | k=65  | k=33  | k=1   |      run 1 = bits 4..7   = columns  32 ..  63
       ...                                                 run 2 = bits 8..11  = columns  64 ..  95
    element 31      | k=127 | k=95  | k=63  | k=31  |      run 3 = bits 12..15 = columns  96 .. 127

    bits   runs a block   columns a block   16-bit elements a block
     8           2               64                   32              int8 (offset binary) and every float8
     4           4              128                   32
     3          16              512                   96   = A[32], B[32], C[32]
     2           8              256                   32

    3 bit: two bits low, one bit high.  run r: low bits 2*(r//2), 2*(r//2)+1 of A (r even) or B (r odd); high bit: bit r of C

Why so:

- one field of all elements is a run of *consecutive* columns, so codes and activations are both read with the widest loads
  there are and meet element by element: no shuffle, no permuted copy of x. 16 bytes are 8 elements of each of the runs;
- a 32-bit word holds two neighbouring columns in its halves: ``(word >> 4r) & 0x000f000f`` is a half2 of columns 2j, 2j+1;
- a field needs no shift to become a float: ``element & (15 << 4r)`` put into the mantissa of a float whose exponent gives
  that bit the weight 1 is ``2**e + code``;
- groups of a multiple of 32 give each run one scale; other groups read a scale a column. Codes do not depend on the group;
- rows are a whole number of blocks (64 bytes, 192 with 3 bits), so every row starts aligned whatever K is; N isn't padded.

``codes``: int16 ``[N, blocks * elements a block]``, padded columns are code 0 and must meet activations of 0.
``scale``: ``[N, groups]`` float32, float16 or bfloat16, ``groups = ceil(K / group_size)``, one where group_size is 0.
``zero``: None (symmetric: ``2 ** (bits - 1)``), uint8 in code units, or a shift in the scale's dtype; ``[N, groups]``.
With float8 codes the bytes are the float8's own bits and zero is None. Siblings stacked on N and gate/up pairs are
consecutive rows: nothing is interleaved. A stack of experts ``[E, N, K]`` is packed as ``[E * N, K]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.kernels.layouts.logical import check_parts

RUN = 32
"""Columns in a run, and 16-bit elements that hold it."""
BITS = (2, 3, 4, 8)
"""Bits a code may take in this layout."""
_CHUNK = 1 << 22  # codes handled at a time, so that packing a large matrix needs little memory besides the result


def runs(bits: int) -> int:
    """Runs in a block."""
    _check_bits(bits)
    return 16 if bits == 3 else 16 // bits


def block_columns(bits: int) -> int:
    """Columns of the weight in a block: 64, 128, 512 or 256 for 8, 4, 3 or 2 bits."""
    return RUN * runs(bits)


def block_elements(bits: int) -> int:
    """16-bit elements of a row in a block: 96 for 3 bits, else 32."""
    _check_bits(bits)
    return 3 * RUN if bits == 3 else RUN


def row_elements(cols: int, bits: int) -> int:
    """16-bit elements of a row of ``cols`` columns, padding included."""
    return -(-cols // block_columns(bits)) * block_elements(bits)


def group_count(cols: int, group_size: int) -> int:
    """Groups in a row; group_size 0 is one group a row."""
    return -(-cols // group_size) if group_size else 1


@dataclass(frozen=True)
class Planes:
    """A packed matrix; see the module's docstring for the three tensors.

    bits: 2, 3, 4 or 8. group_size: columns that share a scale, 0 = one scale a row. cols: K, without padding.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    cols: int

    @property
    def rows(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all three tensors."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero) if t is not None)


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Planes:
    """Pack unsigned codes: uint8 ``[N, K]``, each below ``2 ** bits``, with scale and zero point ``[N, groups]``.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
    """
    _check(codes, scale, zero, bits, group_size)
    return Planes(pack_codes(codes, bits), scale.contiguous(), None if zero is None else zero.contiguous(),
                  bits, group_size, codes.shape[1])  # fmt: skip


def unpack(planes: Planes) -> tuple[Tensor, Tensor, Tensor | None]:
    """The exact inverse of :func:`pack`: codes uint8 ``[N, K]``, scale, zero."""
    return unpack_codes(planes.codes, planes.bits, planes.cols), planes.scale, planes.zero


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[N, K]`` -> int16 ``[N, row_elements(K, bits)]``."""
    rows, cols = codes.shape
    packed = codes.new_empty((rows, row_elements(cols, bits)), dtype=torch.int16)
    step = max(1, _CHUNK // max(1, cols))
    for start in range(0, rows, step):
        packed[start : start + step] = _pack_chunk(codes[start : start + step], bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """int16 ``[N, elements]`` -> uint8 ``[N, cols]``, by chunks of rows."""
    if packed.shape[-1] != row_elements(cols, bits):
        raise ValueError(
            f"{cols} columns of {bits} bits are {row_elements(cols, bits)} elements a row, got {packed.shape[-1]}"
        )
    codes = packed.new_empty((packed.shape[0], cols), dtype=torch.uint8)
    step = max(1, _CHUNK // max(1, cols))
    for start in range(0, packed.shape[0], step):
        codes[start : start + step] = _unpack_chunk(packed[start : start + step], bits, cols)
    return codes


def dequantize(planes: Planes) -> Tensor:
    """The float32 weight ``[N, K]`` of integer codes."""
    return dequantize_codes(unpack_codes(planes.codes, planes.bits, planes.cols), planes.scale, planes.zero,
                            planes.bits, planes.group_size)  # fmt: skip


def dequantize_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """float32 values of codes ``[N, K]``: unsigned integers, or a float8 dtype."""
    cols = codes.shape[1]
    group = torch.arange(cols, device=codes.device) // (group_size or max(cols, 1))
    s, u = scale.to(torch.float32)[:, group], codes.to(torch.float32)
    if codes.dtype != torch.uint8:
        return u * s
    if zero is None:
        return (u - 2 ** (bits - 1)) * s
    z = zero.to(torch.float32)[:, group]
    return (u - z) * s if zero.dtype == torch.uint8 else u * s + z


def _pack_chunk(codes: Tensor, bits: int) -> Tensor:
    rows, cols = codes.shape
    blocks = -(-cols // block_columns(bits))
    padded = torch.nn.functional.pad(codes, (0, blocks * block_columns(bits) - cols)).to(torch.int32)
    if bits != 3:
        fields = padded.view(rows, blocks, runs(bits), RUN)
        return _fields_to_elements(fields, bits).reshape(rows, -1)
    pairs = padded.view(rows, blocks, 8, 2, RUN)  # run = 2 * pair + half
    low = [_fields_to_elements(pairs[:, :, :, half] & 3, 2) for half in (0, 1)]
    high = _fields_to_elements(padded.view(rows, blocks, 16, RUN) >> 2, 1)
    return torch.cat([*low, high], dim=-1).reshape(rows, -1)


def _unpack_chunk(packed: Tensor, bits: int, cols: int) -> Tensor:
    rows = packed.shape[0]
    blocks = packed.view(rows, -1, block_elements(bits)).to(torch.int32) & 0xFFFF
    if bits != 3:
        codes = _elements_to_fields(blocks, bits)
    else:
        low = torch.stack([_elements_to_fields(blocks[..., i * RUN : (i + 1) * RUN], 2) for i in (0, 1)], dim=3)
        codes = low.flatten(2, 3) | (_elements_to_fields(blocks[..., 2 * RUN :], 1) << 2)
    return codes.reshape(rows, -1)[:, :cols].to(torch.uint8)


def _fields_to_elements(fields: Tensor, bits: int) -> Tensor:
    """int32 ``[rows, blocks, 16 / bits, 32]`` -> int16 ``[rows, blocks, 32]``."""
    elements = fields[:, :, 0].clone()
    for r in range(1, fields.shape[2]):
        elements |= fields[:, :, r] << (bits * r)
    # to two's complement by hand: what an overflowing cast does is not the same everywhere
    return torch.where(elements >= 1 << 15, elements - (1 << 16), elements).to(torch.int16)


def _elements_to_fields(elements: Tensor, bits: int) -> Tensor:
    """int32 ``[rows, blocks, 32]``, 0..65535 -> int32 ``[rows, blocks, 16 / bits, 32]``."""
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=elements.device).view(1, 1, -1, 1)
    return (elements.unsqueeze(2) >> shifts) & (2**bits - 1)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits}: the planes layout stores codes in 2, 3, 4 or 8 bits; widen 5, 6 and 7 to 8")


def _check(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> None:
    _check_bits(bits)
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8 [N, K], got {codes.dtype} {list(codes.shape)}")
    if group_size < 0:
        raise ValueError(f"group_size={group_size}: give a positive size, or 0 for one group a row")
    expected = (codes.shape[0], group_count(codes.shape[1], group_size))
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale must be {list(expected)} for codes {list(codes.shape)}, group_size={group_size}; got {list(scale.shape)}"
        )
    check_parts(scale, zero)
    real = not codes.is_meta and not isinstance(codes, torch._subclasses.FakeTensor)
    if bits < 8 and real and codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes reach {int(codes.max())}, which does not fit {bits} bits (at most {2**bits - 1})")
