"""Inductor's templates of the products: the same inner loops as the kernels that are launched by hand, which are imported.

A template ends in float32 sums; Inductor puts what follows (bias, activation, residual, the next operator's rounding) in the
place where they would be stored. With K split it stores ``[SPLIT, M, N]``, and whoever reads that adds the parts up. With
GLU the sums are of a gate and of up, and bias and activation are in the template.

This module needs Inductor and Jinja, not Triton; generated code imports the functions of :mod:`qcompile.kernels.triton`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

_IMPORTED = ("decode", "finish", "gemm", "gemv", "pairs", "quantized")


def _digest() -> str:
    """Of what generated code imports: caches of compiled kernels and of timings know a kernel by its text alone."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"\0".join((folder / f"{name}.py").read_bytes() for name in _IMPORTED)).hexdigest()


_IMPORTS = f"""
# of functions {_digest()}
from qcompile.kernels.triton.finish import activate
from qcompile.kernels.triton.gemm import accumulate, row_scale, tile_of
from qcompile.kernels.triton.gemv import dot_rows
from qcompile.kernels.triton.pairs import paired_rows, unpair
from qcompile.kernels.triton.quantized import scaled_products
"""

_PLANES = """
{{def_kernel("x", "codes", "scale", "zero", "bias")}}
    N = {{size("codes", 0)}} // (2 if GLU else 1)
    elements, groups = {{size("codes", 1)}}, {{size("scale", 1)}}
"""

_CODES = """
{{def_kernel("x", "x_scale", "w", "w_scale", "bias")}}
    N = {{size("w", 0)}} // (2 if GLU else 1)
    w_stride = {{stride("w", 0)}}
"""

_SIZES = """
    M = {{size("x", 0)}}
    K = {{size("x", 1)}}
    x_stride = {{stride("x", 0)}}
    unknown = tl.program_id(2)  # 0, but not to the compiler: a loop stays a loop, and a constant in its register
    first = tl.program_id(1) * STEPS
    last = tl.minimum(first + STEPS, BLOCKS + unknown)
"""

_TILE = """
    first_n, first_m = tile_of(tl.program_id(0), M, N, OUT, BM, PANEL)
    m = first_m + tl.arange(0, BM)
    x_row = tl.minimum(m, M - 1).to(tl.int64)
"""

_ROWS = """
    {% if GLU %}
    row = paired_rows(first_n, N, BN)
    {% else %}
    row = tl.minimum(first_n + tl.arange(0, BN), N - 1).to(tl.int64)
    {% endif %}
"""

_GEMM = """
    acc = accumulate(
        tl.zeros((BN, BM), tl.float32), x, codes, scale, zero, row, x_row, K, x_stride, elements, groups, first, last, BITS,
        KIND, ZERO, GROUP, EVEN, PRECISION, HIP, PARTS,
    )
    acc = row_scale(acc, scale, row, KIND, ZERO, GROUP)
"""

_FIRST_ROWS = """
    first_n = tl.program_id(0) * OUT
    m = tl.arange(0, BM)
"""

_GEMV = """
    magic = REGISTER + unknown
    sum0, sum1 = dot_rows(
        x, codes, scale, zero, row, K, x_stride, elements, BLOCKS, groups, first, last, magic, BM, BITS, KIND, ZERO, GROUP,
        BB, EVEN, WORDS,
    )
    {% if BM == 1 %}
    acc = sum0[:, None]
    {% else %}
    acc = tl.join(sum0, sum1)
    {% endif %}
"""

_SCALED = """
    acc = scaled_products(
        x, x_scale, w, w_scale, row, x_row, K, x_stride, w_stride, GROUPS, first, last, KIND, KIND, True, X_ROWS, W_ROWS,
        GROUP, BK, RUNS, EVEN,
    )
"""

_STORE = """
    n = first_n + tl.arange(0, OUT)
    index_n, index_m = n.to(INDEX_DTYPE)[:, None], m.to(INDEX_DTYPE)[None, :]
    mask = (index_n < N) & (index_m < M)
    {% if GLU %}
    gate, up = unpair(acc)
    {% if HAS_BIAS %}
    of = tl.minimum(n, N - 1)
    gate += tl.load(bias + of).to(tl.float32)[:, None]
    up += tl.load(bias + N + of).to(tl.float32)[:, None]
    {% endif %}
    acc = activate(gate, ACTIVATION) * up
    {% endif %}
    {% if SPLIT == 1 %}
    {{store_output(("index_m", "index_n"), "acc", "mask", val_shape=("OUT", "BM"))}}
    {% else %}
    part = tl.program_id(1).to(INDEX_DTYPE)
    {{store_output(("part", "index_m", "index_n"), "acc", "mask", val_shape=("OUT", "BM"))}}
    {% endif %}
"""


@SymbolicGridFn
def tiles(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    """Tiles of an ``[m, n]`` result, parts of K."""
    return cdiv(n, meta["OUT"]) * cdiv(m, meta["BM"]), meta["SPLIT"], 1


@SymbolicGridFn
def strips(m: Any, n: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    """As :func:`tiles`, where one program takes all rows of x."""
    return cdiv(n, meta["OUT"]), meta["SPLIT"], 1


#: Of a weight in the planes layout by the ``way`` of a configuration; and of codes by codes.
TEMPLATES = {
    "gemm": TritonTemplate("qcompile_gemm", tiles, _IMPORTS + _PLANES + _SIZES + _TILE + _ROWS + _GEMM + _STORE),
    "gemv": TritonTemplate("qcompile_gemv", strips, _IMPORTS + _PLANES + _SIZES + _FIRST_ROWS + _ROWS + _GEMV + _STORE),
    "codes": TritonTemplate("qcompile_codes", tiles, _IMPORTS + _CODES + _SIZES + _TILE + _ROWS + _SCALED + _STORE),
}
