"""Random quantized matrices ``[N, K]`` with the float64 matrix that they stand for, before any layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("symmetric", "affine", "shift")


@dataclass(frozen=True)
class Matrix:
    codes: Tensor  # uint8 [N, K]
    scale: Tensor  # [N, groups]
    zero: Tensor | None
    value: Tensor  # float64 [N, K]


def random_matrix(n: int, k: int, group: int, bits: int, kind: str, dtype: torch.dtype = torch.float32) -> Matrix:
    """Random codes; scales between 0.5 and 1.5; zero points anywhere, shifts near the middle. group 0: one a row."""
    size = group if 0 < group < k else k
    groups = -(-k // size)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = (torch.rand(n, groups) + 0.5).to(dtype)
    wide = scale.double().repeat_interleave(size, 1)[:, :k]
    if kind == "symmetric":
        return Matrix(codes, scale, None, (codes.double() - 2 ** (bits - 1)) * wide)
    if kind == "affine":
        zero = torch.randint(0, 2**bits, (n, groups)).to(torch.uint8)
        return Matrix(codes, scale, zero, (codes.double() - zero.double().repeat_interleave(size, 1)[:, :k]) * wide)
    shift = (-(2 ** (bits - 1) + torch.randn(n, groups)) * scale.float()).to(dtype)
    return Matrix(codes, scale, shift, codes.double() * wide + shift.double().repeat_interleave(size, 1)[:, :k])
