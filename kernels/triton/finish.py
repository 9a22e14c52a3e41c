"""From partial float32 sums to the result: the sum over the parts of K, bias, activation, gate, product, residual."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_FINISH_BLOCK = 512


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """An activation by name, in float32."""
    if ACTIVATION == "relu":
        return tl.maximum(v, 0.0)
    elif ACTIVATION == "silu":
        return v / (1.0 + tl.exp(-v))
    elif ACTIVATION == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-v))
    elif ACTIVATION == "tanh":
        return _tanh(v)
    elif ACTIVATION == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * v * (1.0 + _tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)))
    elif ACTIVATION == "relu6":
        return _to_six(v)
    elif ACTIVATION == "hardswish":
        return v * _to_six(v + 3.0) / 6.0
    elif ACTIVATION == "hardsigmoid":
        return _to_six(v + 3.0) / 6.0
    else:
        tl.static_assert(ACTIVATION == "none", "an activation that is not known here")
        return v


@triton.jit
def _to_six(v):
    return tl.where(v < 0.0, 0.0, tl.where(v > 6.0, 6.0, v))  # NaN stays


@triton.jit
def _tanh(v):
    e = tl.exp(-2.0 * tl.abs(v))  # never overflows
    t = (1.0 - e) / (1.0 + e)
    return tl.where(v < 0, -t, t)


@triton.jit
def _sums(partial, at, mask, stride, SPLIT: tl.constexpr):
    total = tl.load(partial + at, mask=mask, other=0.0)
    for part in range(1, SPLIT):
        total += tl.load(partial + part * stride + at, mask=mask, other=0.0)
    return total


@triton.jit
def finish(
    partial, bias, mul, add, out, N, columns, first, stride,
    SPLIT: tl.constexpr, ACTIVATION: tl.constexpr, GLU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MUL: tl.constexpr,
    HAS_ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of ``out`` ``[M, N]``, contiguous, of any float dtype. Grid ``(M, ceil(N / BLOCK))``.

    partial: ``[SPLIT, M, columns]``, ``stride`` = M * columns; the result is made of its columns from ``first`` on, with GLU
    from two times N of them, gate first. mul, add: ``[M, N]``; bias: ``[columns]``.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    at = row * columns + first + column
    value = _sums(partial, at, mask, stride, SPLIT)
    if HAS_BIAS:
        value += tl.load(bias + first + column, mask=mask, other=0.0).to(tl.float32)
    value = activate(value, ACTIVATION)
    if GLU:
        up = _sums(partial, at + N, mask, stride, SPLIT)
        if HAS_BIAS:
            up += tl.load(bias + first + N + column, mask=mask, other=0.0).to(tl.float32)
        value *= up
    if HAS_MUL:
        value *= tl.load(mul + row * N + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADD:
        value += tl.load(add + row * N + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * N + column, value.to(out.dtype.element_ty), mask=mask)


def add_parts(
    partial: Tensor, out: Tensor, first: int, bias: Tensor | None, mul: Tensor | None, add: Tensor | None,
    activation: str, glu: bool,
) -> None:  # fmt: skip
    """Launch :func:`finish`: ``partial`` is float32 ``[split, M, columns]``, ``out`` ``[M, N]`` and contiguous."""
    split, rows, columns = partial.shape
    finish[(rows, triton.cdiv(out.shape[1], _FINISH_BLOCK))](
        partial, partial if bias is None else bias, out if mul is None else mul, out if add is None else add, out,
        out.shape[1], columns, first, rows * columns, SPLIT=split, ACTIVATION=activation, GLU=glu,
        HAS_BIAS=bias is not None, HAS_MUL=mul is not None, HAS_ADD=add is not None, BLOCK=_FINISH_BLOCK, num_warps=4,
    )  # fmt: skip
