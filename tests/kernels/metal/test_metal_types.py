"""The Metal source through clang, with Metal's kinds of memory as address spaces; and that mistakes would be found."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiled_weights import ACTIVATIONS

from qcompile.kernels.metal import linear

pytest.importorskip("clang.cindex", reason="needs the package libclang")
from metal_types import problems


def specialized(
    dtype: torch.dtype = torch.float16,
    bits: int = 4,
    kind: int = 1,
    activation: str = "gelu",
    rows: int = 4,
    all_of_it: bool = True,
) -> str:
    x = torch.zeros(1, 1, dtype=dtype)
    zero = (None, x.to(torch.uint8), x)[kind]
    extra = x if all_of_it else None
    given = linear.definitions(x, bits, x, zero, extra, activation, extra, extra, rows, all_of_it)
    return "".join(f"#define {name} {value}\n" for name, value in given) + linear.text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_every_variant_is_well_typed(dtype: torch.dtype) -> None:
    for bits, kind, all_of_it in itertools.product((4, 8), (0, 1, 2), (True, False)):
        assert problems(specialized(dtype, bits, kind, "gelu", 4 if all_of_it else 1, all_of_it)) == []
    for activation in ACTIVATIONS:
        assert problems(specialized(dtype, activation=activation)) == []


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("device const QC_FLOAT* x [[", "const QC_FLOAT* x [[", "cannot initialize"),
        ("device const QC_FLOAT* from", "const QC_FLOAT* from", "cannot initialize"),
        ("bias, mul, add, y);", "bias, mul, add, y_tile);", "no matching function"),
        ("const int part_m", "M = 3;\n    const int part_m", "const-qualified"),
        ("threadgroup QC_TILE x_tile", "threadgroup float x_tile", "no matching function"),
        ("threadgroup_barrier(mem_flags::mem_threadgroup)", "threadgroup_barrier()", "no matching function"),
        ("simd_sum(sum[m][r])", "simd_sum(sum[m])", "no matching function"),
        ("simd_sum(sum[m][r])", "simd_total(sum[m][r])", "undeclared identifier"),
        ("precise::exp", "std::exp", "undeclared identifier"),
        ("const int n =", "const int unread = 3;\n            const int n =", "unused variable"),
    ],
)
def test_a_mistake_is_found(right: str, wrong: str, complaint: str) -> None:
    source = specialized()
    assert right in source
    assert any(complaint in found for found in problems(source.replace(right, wrong)))
