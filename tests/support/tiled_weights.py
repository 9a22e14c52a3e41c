"""Random weights in the tiled layout with the float64 matrix that they stand for, and the kernels to try them on."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.kernels.cpu import build
from qcompile.kernels.layouts.tiled import Geometry, Tiled, pack

ARM = platform.machine().lower() in ("aarch64", "arm64")
ISAS = ("portable", "neon") if ARM else ("portable", "avx2", "avxvnni", "avx512vnni")
KINDS = ("symmetric", "affine", "shift")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": torch.nn.functional.relu6,
    "hardswish": torch.nn.functional.hardswish,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
}


def usable_isas() -> list[str]:
    """The instruction sets of this machine, or none where there is no compiler."""
    if not build.ensure_loaded().loaded:
        return []
    found = []
    for name in ISAS:
        try:
            build.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    build.set_isa("")
    return found


@dataclass(frozen=True)
class Weights:
    tiled: Tiled
    matrix: Tensor  # float64 [N, K]

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.tiled.codes, self.tiled.scale, self.tiled.zero


def random_weight(
    n: int,
    k: int,
    group: int,
    bits: int,
    kind: str = "affine",
    *,
    dtype: torch.dtype = torch.float32,
    parts: tuple[int, ...] | None = None,
    glu: bool = False,
) -> Weights:
    """A packed weight of random codes, scales between 0.5 and 1.5, and zero points or shifts near the middle."""
    groups, size = Geometry.of(k, group).groups, group if 0 < group < k else k
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = (torch.rand(n, groups) + 0.5).to(dtype)
    middle = 2 ** (bits - 1)
    zero: Tensor | None = None
    if kind == "affine":
        zero = torch.randint(middle - 1, middle + 2, (n, groups)).to(torch.uint8)
    elif kind == "shift":
        zero = (-(middle + torch.randn(n, groups)) * scale.float()).to(dtype)

    def wide(t: Tensor) -> Tensor:
        return t.double().repeat_interleave(size, 1)[:, :k]

    if zero is None:
        matrix = (codes.double() - middle) * wide(scale)
    elif kind == "affine":
        matrix = (codes.double() - wide(zero)) * wide(scale)
    else:
        matrix = codes.double() * wide(scale) + wide(zero)
    return Weights(pack(codes, scale, zero, bits, group, parts, glu), matrix)


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


def random_float8(
    n: int,
    k: int,
    group: int,
    codes: torch.dtype,
    *,
    dtype: torch.dtype = torch.float32,
    parts: tuple[int, ...] | None = None,
    glu: bool = False,
) -> Weights:
    """A packed weight of float8 codes, subnormal ones among them, and scales between 0.5 and 1.5."""
    groups, size = Geometry.of(k, group).groups, group if 0 < group < k else k
    value = torch.randn(n, k) * torch.exp(2 * torch.randn(n, k)).clamp(max=200)
    value = value.clamp(-torch.finfo(codes).max, torch.finfo(codes).max).to(codes)
    scale = (torch.rand(n, groups) + 0.5).to(dtype)
    matrix = value.double() * scale.double().repeat_interleave(size, 1)[:, :k]
    return Weights(pack(value, scale, None, 8, group, parts, glu), matrix)


def error(y: Tensor, expected: Tensor, x: Tensor, matrix: Tensor) -> float:
    """The norm of the error over the norm that x @ matrix.T has when nothing cancels."""
    scale = ((x.double() ** 2) @ (matrix**2).T).sum().sqrt()
    return float((y.double() - expected).norm() / scale)
