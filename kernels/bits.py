"""Bit packing: codes of 2 to 7 bits, several to a byte, along the last axis.

The codes form one little-endian bit stream a row: code 0 in the lowest bits of byte 0. Rows are padded to whole bytes,
so that a row can be read without its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes.

    Args:
        codes: uint8, shape ``[..., K]``, values below ``2**bits``.
        bits: 1 to 8.

    Returns:
        uint8, shape ``[..., ceil(K * bits / 8)]``, contiguous.

    Raises:
        TypeError: codes are not uint8.
        ValueError: bits out of range, or a code that needs more bits.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
        [33, 3]
    """
    _check(codes, bits, "codes")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits (at most {(1 << bits) - 1})")
    if bits == 8:
        return codes.contiguous()
    length = codes.shape[-1]
    if 8 % bits == 0:
        per_byte = 8 // bits
        chunks = _chunks(codes, per_byte)
        packed = chunks[..., 0].clone(memory_format=torch.contiguous_format)
        for i in range(1, per_byte):
            packed |= chunks[..., i] << (bits * i)
        return packed
    chunks = _chunks(codes, 8).to(torch.int64)
    word = torch.zeros_like(chunks[..., 0])
    for i in range(8):
        word |= chunks[..., i] << (bits * i)
    data = torch.stack([(word >> (8 * i)) & 0xFF for i in range(bits)], dim=-1).to(torch.uint8)
    return data.flatten(-2)[..., : -(-length * bits // 8)].contiguous()


def unpack_bits(data: Tensor, bits: int, length: int) -> Tensor:
    """The exact inverse of :func:`pack_bits`, in ops that Inductor can fuse.

    Args:
        data: uint8, shape ``[..., ceil(length * bits / 8)]``.
        bits: 1 to 8.
        length: K, how many codes a row holds.

    Returns:
        uint8, shape ``[..., length]``.

    Raises:
        TypeError: data is not uint8.
        ValueError: bits out of range, or rows that are not ``length`` codes long.
    """
    _check(data, bits, "data")
    if length < 0:
        raise ValueError(f"a row holds at least no codes, got length {length}")
    if data.shape[-1] != -(-length * bits // 8):
        raise ValueError(
            f"{length} codes of {bits} bits take {-(-length * bits // 8)} bytes a row, got {data.shape[-1]} bytes"
        )
    if bits == 8:
        return data
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        codes = torch.stack([(data >> (bits * i)) & mask for i in range(8 // bits)], dim=-1)
        return codes.flatten(-2)[..., :length]
    chunks = _chunks(data, bits).to(torch.int32)
    columns = []
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        value = chunks[..., byte] >> shift
        if shift + bits > 8:
            value = value | (chunks[..., byte + 1] << (8 - shift))
        columns.append(value & mask)
    return torch.stack(columns, dim=-1).to(torch.uint8).flatten(-2)[..., :length]


def _chunks(values: Tensor, size: int) -> Tensor:
    """The last axis in chunks of ``size``, zero-padded at its end: ``[..., K]`` to ``[..., ceil(K / size), size]``."""
    missing = -values.shape[-1] % size
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.unflatten(-1, (values.shape[-1] // size, size))


def _check(values: Tensor, bits: int, what: str) -> None:
    if values.dtype != torch.uint8:
        raise TypeError(f"{what} must be uint8, got {values.dtype}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if values.dim() == 0:
        raise ValueError(f"{what} must have at least one axis, got a scalar")
