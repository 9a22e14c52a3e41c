"""What the operators on the planes layout share: checks that work on symbolic sizes, and the plain-torch decode."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.layouts.planes import BITS, dequantize_codes, group_count, row_elements, unpack_codes
from qcompile.kernels.ops._tiled import FLOATS

#: What a byte of an 8-bit weight may be: an integer code, a float8 of torch, or one whose codes are all known to be finite.
FLOAT8 = {
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
    "finite_e4m3fn": torch.float8_e4m3fn,
    "finite_e4m3fnuz": torch.float8_e4m3fnuz,
    "finite_e5m2": torch.float8_e5m2,
}
KINDS = ("int", *FLOAT8)


def check_planes(
    op: str, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int,
    lead: tuple[int | torch.SymInt, ...], cols: int,
) -> None:  # fmt: skip
    """Raise ValueError unless this is a packed weight of ``lead`` rows (``(N,)`` or ``(E, N)``) and ``cols`` columns."""
    if bits not in BITS:
        raise ValueError(f"{op}: bits must be one of {BITS}, got {bits}")
    if kind not in KINDS or (kind != "int" and (bits != 8 or zero is not None)):
        raise ValueError(f"{op}: kind must be one of {KINDS}, a float8 with bits=8 and no zero; got {kind!r}, bits={bits}")
    if group_size < 0:
        raise ValueError(f"{op}: group_size must be positive, or 0 for one group a row, got {group_size}")
    _check_part(op, "codes", codes, (torch.int16,), (*lead, row_elements(cols, bits)))
    grouped = (*lead, group_count(cols, group_size))
    _check_part(op, "scale", scale, FLOATS, grouped)
    if zero is not None:
        _check_part(op, "zero", zero, (torch.uint8, scale.dtype), grouped)


def _check_part(
    op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | torch.SymInt, ...]
) -> None:
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} must be {allowed}, got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}")


def dequantize_planes_rows(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int, cols: int
) -> Tensor:
    """The float32 weight ``[N, cols]``."""
    plain = unpack_codes(codes, bits, cols)
    return dequantize_codes(plain if kind == "int" else plain.view(FLOAT8[kind]), scale, zero, bits, group_size)
