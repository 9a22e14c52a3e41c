"""Runs ``linear.metal``: which kernel takes how many rows, what it is specialized for, and how it is called.

:func:`compile_source` is ``torch.mps.compile_shader``; tests put an emulator of Apple's GPUs in its place, so that all of
this, and the kernels' text as it stands, runs on any machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.layouts.rows import Geometry
from qcompile.kernels.ops._epilogue import epilogue
from qcompile.kernels.ops._library import lib
from qcompile.kernels.ops._tiled import ACTIVATIONS
from qcompile.kernels.ops.linear_rows import check_linear, check_split

#: Up to this many rows of x the weight is read once for every four of them; beyond, matrix units take tiles of 32.
GEMV_ROWS = 8
_TYPES = {torch.float16: "half", torch.float32: "float", torch.bfloat16: "bfloat"}
_SIZES = range(8, 14)  # places of the arguments that are int32 numbers


def compile_source(source: str) -> Any:
    """A library of kernels. Raises RuntimeError where there is no Apple GPU."""
    return torch.mps.compile_shader(source)


@functools.cache
def text() -> str:
    """The Metal source, without the definitions that it expects before it."""
    return (Path(__file__).parent / "linear.metal").read_text(encoding="utf-8")


@functools.cache
def _library(compiler: Callable[[str], Any], definitions: tuple[tuple[str, str | int], ...]) -> Any:
    return compiler("".join(f"#define {name} {value}\n" for name, value in definitions) + text())


def definitions(
    x: Tensor, bits: int, scale: Tensor, zero: Tensor | None, bias: Tensor | None, activation: str = "none",
    mul: Tensor | None = None, add: Tensor | None = None, rows_at_once: int = 1, aligned: bool = False,
) -> tuple[tuple[str, str | int], ...]:  # fmt: skip
    """What the source is specialized for: the text's head explains each name."""
    kind = 0 if zero is None else 1 if zero.dtype == torch.uint8 else 2
    return (
        ("QC_FLOAT", _TYPES[x.dtype]),
        ("QC_TILE", "half" if x.dtype == torch.float16 else "float"),
        ("QC_BITS", bits),
        ("QC_SCALE", _TYPES[scale.dtype]),
        ("QC_ZERO_KIND", kind),
        ("QC_ZERO", _TYPES[scale.dtype] if kind == 2 else "uchar"),
        ("QC_BIAS", _TYPES[x.dtype if bias is None else bias.dtype]),
        ("QC_HAS_BIAS", int(bias is not None)),
        ("QC_HAS_MUL", int(mul is not None)),
        ("QC_HAS_ADD", int(add is not None)),
        ("QC_ACTIVATION", list(ACTIVATIONS).index(activation)),
        ("QC_M", rows_at_once),
        ("QC_ALIGNED", int(aligned)),
    )


def _run(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``act(x @ W.T + bias) [* mul] [+ add]`` for all rows of the packed weight."""
    k, n = x.shape[-1], codes.shape[0]
    out = x.new_empty([*x.shape[:-1], n])
    flat = x.reshape(-1, k).contiguous()
    m = flat.shape[0]
    if m == 0:
        return out
    geometry = Geometry.of(k, group_size)
    aligned = k % 4 == 0 and (geometry.groups == 1 or geometry.size % 4 == 0) and flat.storage_offset() % 4 == 0
    at_once = m if m <= 2 else 4 if m <= GEMV_ROWS else 1
    mul, add = (None if t is None else t.contiguous() for t in (mul, add))
    given = definitions(flat, bits, scale, zero, bias, activation, mul, add, at_once, aligned)
    library = _library(compile_source, given)
    # A kernel names all its arguments; those that it does not read get some tensor.
    tensors = [t if t is not None else out for t in (flat, codes, scale, zero, bias, mul, add, out)]
    sizes = (m, n, k, geometry.size, geometry.groups, geometry.chunks)
    if m <= GEMV_ROWS:
        kernel, threads, group = library.gemv, (-(-n // 8) * 64, -(-m // at_once)), 64
    else:
        kernel, threads, group = library.gemm, (-(-n // 64) * 128, -(-m // 32)), 128
    kernel(*tensors, *sizes, threads=threads, group_size=(group, 1), arg_casts=dict.fromkeys(_SIZES, "int32"))
    return out


def linear_rows(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None, glu: bool = False,
) -> Tensor:  # fmt: skip
    """``qcompile::linear_rows`` on an Apple GPU."""
    check_linear(x, codes, scale, zero, bias, bits, group_size, out_features, activation, mul, add, glu)
    codes, scale, zero, bias = _contiguous(codes, scale, zero, bias)
    if not glu:
        return _run(x, codes, scale, zero, bias, bits, group_size, activation, mul, add)
    both = _run(x, codes, scale, zero, bias, bits, group_size)
    return epilogue(both, activation, mul, add, glu).contiguous()


def linear_rows_split(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """``qcompile::linear_rows_split`` on an Apple GPU: one launch a sibling, on its rows of the weight."""
    check_split(x, codes, scale, zero, bias, bits, group_size, sizes)
    tensors = _contiguous(codes, scale, zero, bias)
    parts: Any = zip(*[[None] * len(sizes) if t is None else t.split(list(sizes)) for t in tensors], strict=True)
    return [_run(x, codes, scale, zero, bias, bits, group_size) for codes, scale, zero, bias in parts]


def _contiguous(codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in (codes, scale, zero, bias))


for _name, _kernel in (("linear_rows", linear_rows), ("linear_rows_split", linear_rows_split)):
    lib.impl(_name, _kernel, "MPS")
    lib.impl(f"{_name}_forward", _kernel, "MPS")
