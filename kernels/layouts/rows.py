"""The ``rows`` layout: what the Metal kernels read. Row after row, as the weight itself, in chunks of 16 columns.

``K`` is cut into the groups of the scheme and each group is padded to whole *chunks* of 16 columns, so that the columns of
a chunk share a scale whatever the group size is; a lane reads a chunk with one load of 8 or 16 bytes::

    weight [N, K]       row n:  | group 0           | group 1           | ...
    codes  [N, bytes]   row n:  | chunk | chunk | ..| chunk | chunk | ..| ...

    4 bit    8 bytes a chunk:  byte j = column 2j (low nibble), column 2j + 1 (high nibble)
    8 bit   16 bytes a chunk:  byte j = column j

``codes``: uint8 ``[N, chunks * 2 * bits]``; padded columns hold code 0 and meet activations of 0.
``scale``: ``[N, groups]`` float32, float16 or bfloat16. ``zero``: None (symmetric: ``2 ** (bits - 1)``), uint8 in code
units, or a shift in the scale's dtype; ``[N, groups]``. Siblings and gate/up pairs are consecutive rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 16
"""Columns of one chunk."""
BITS = (4, 8)
"""Bits a code may take."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_SLICE = 1 << 22  # codes handled at a time, so that packing a large matrix needs little extra memory


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from K and ``group_size`` (0 = one group a row)."""

    cols: int
    size: int
    groups: int
    chunks_per_group: int
    chunks: int

    @staticmethod
    def of(cols: int, group_size: int) -> Geometry:
        size = group_size if 0 < group_size < cols else cols
        groups = -(-cols // size) if size else 0
        per_group = -(-size // CHUNK)
        last = cols - (groups - 1) * size
        return Geometry(cols, size, groups, per_group, (groups - 1) * per_group + -(-last // CHUNK) if groups else 0)

    def columns(self, device: torch.device | str = "cpu") -> Tensor:
        """The padded column of every column: int64 ``[K]``, strictly increasing."""
        k = torch.arange(self.cols, device=device)
        return k // max(self.size, 1) * (self.chunks_per_group * CHUNK) + k % max(self.size, 1)


@dataclass(frozen=True)
class Rows:
    """A packed matrix; see the module's docstring for the three tensors."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    cols: int


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Rows:
    """Pack unsigned codes: uint8 ``[N, K]``, each below ``2 ** bits``, with scale and zero point ``[N, groups]``.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits}: the rows layout stores codes in 4 or 8 bits; widen 2 and 3 to 4, 5 to 7 to 8")
    if codes.dim() != 2 or codes.dtype != torch.uint8 or not codes.numel():
        raise ValueError(f"codes must be uint8 [N, K], not empty; got {codes.dtype} {list(codes.shape)}")
    if group_size < 0:
        raise ValueError(f"group_size={group_size}: give a positive size, or 0 for one group a row")
    if bits < 8 and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes reach {int(codes.max())}, which does not fit {bits} bits (at most {2**bits - 1})")
    rows, cols = codes.shape
    geometry = Geometry.of(cols, group_size)
    packed = codes.new_empty((rows, geometry.chunks * 2 * bits))
    check("rows.pack", packed, scale, zero, bits, group_size, rows, cols)
    columns, step = geometry.columns(codes.device), max(1, _SLICE // cols)
    for start in range(0, rows, step):
        part = codes[start : start + step]
        padded = codes.new_zeros((len(part), geometry.chunks * CHUNK))
        padded[:, columns] = part
        packed[start : start + step] = padded if bits == 8 else padded[:, ::2] | (padded[:, 1::2] << 4)
    return Rows(packed, scale.contiguous(), None if zero is None else zero.contiguous(), bits, group_size, cols)


def unpack(packed: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
    """The exact inverse of :func:`pack`: unsigned codes ``[N, K]``, scale, zero."""
    return unpack_codes(packed.codes, packed.bits, packed.group_size, packed.cols), packed.scale, packed.zero


def unpack_codes(codes: Tensor, bits: int, group_size: int, cols: int) -> Tensor:
    """uint8 ``[N, bytes]`` -> uint8 ``[N, K]``."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return codes[:, Geometry.of(cols, group_size).columns(codes.device)]


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, cols: int) -> Tensor:
    """The float32 weight ``[N, K]``."""
    u = unpack_codes(codes, bits, group_size, cols).to(torch.float32)
    group = torch.arange(cols, device=codes.device) // Geometry.of(cols, group_size).size
    s = scale.to(torch.float32)[:, group]
    if zero is None:
        return (u - 2 ** (bits - 1)) * s
    z = zero.to(torch.float32)[:, group]
    return (u - z) * s if zero.dtype == torch.uint8 else u * s + z


def check(
    op: str, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, rows: int, cols: int
) -> None:
    """Raise ValueError unless codes, scale and zero are a packed weight of that many rows and columns."""
    if bits not in BITS:
        raise ValueError(f"{op}: bits must be one of {BITS}, got {bits}")
    if group_size < 0:
        raise ValueError(f"{op}: group_size must be positive, or 0 for one group a row, got {group_size}")
    geometry = Geometry.of(cols, group_size)
    if scale.dtype not in FLOATS:
        raise ValueError(f"{op}: scale must be float32, float16 or bfloat16, got {scale.dtype}")
    wanted = [("codes", codes, (torch.uint8,), geometry.chunks * 2 * bits), ("scale", scale, FLOATS, geometry.groups)]
    if zero is not None:
        wanted.append(("zero", zero, (torch.uint8, scale.dtype), geometry.groups))
    for name, tensor, dtypes, width in wanted:
        if tensor.dtype not in dtypes:
            raise ValueError(f"{op}: {name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.dim() != 2 or tensor.shape[0] != rows or tensor.shape[1] != width:
            raise ValueError(
                f"{op}: {name} must be {[rows, width]} for {cols} columns, bits={bits}, group_size={group_size}; "
                f"got {list(tensor.shape)}"
            )
