"""Triton's interpreter made exact: bfloat16 and float8 as a GPU has them.

The interpreter of triton 3.7.1 holds bfloat16 as integers and computes on those, truncates where a GPU rounds, and loses
NaN and infinity of float8. :func:`install` mends that for this process, which was started with ``TRITON_INTERPRET=1``.
It changes the interpreter only, never what is compiled for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

VERSION = "3.7.1"

_TORCH = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5": torch.float8_e5m2,
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: GPUs saturate when they convert to these.
_LARGEST = {"fp8e4nv": 448.0, "fp8e4b8": 240.0, "fp8e5": 57344.0}


def as_torch(data: np.ndarray, name: str) -> torch.Tensor:
    """The interpreter's array as a tensor of the dtype that it stands for."""
    dtype = _TORCH[name]
    integer = "u1" if dtype.itemsize == 1 else f"i{dtype.itemsize}"
    bits = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(integer).copy())
    return bits.view(dtype).reshape(data.shape)


def as_array(tensor: torch.Tensor, like: np.dtype[Any]) -> np.ndarray:
    """A tensor as the interpreter's array."""
    raw = tensor.contiguous().view(_INTEGERS[tensor.element_size()]).numpy()
    return raw.view(like)


def convert(data: np.ndarray, source: Any, target: Any, rounding: Any = None) -> np.ndarray:
    """Round to nearest even; to float8, saturate finite values. Returns unsigned integers of the target's width."""
    value = as_torch(data, source.name).to(torch.float64 if source.name == "fp64" else torch.float32)
    if target.name in _LARGEST and source.name not in _LARGEST:
        limit = _LARGEST[target.name]
        value = torch.where(value.isinf() & torch.tensor(target.name == "fp8e5"), value, value.clamp(-limit, limit))
    result = value.to(_TORCH[target.name])
    return as_array(result, np.dtype(f"u{result.element_size()}"))


def install() -> None:
    """Mend the interpreter of this process.

    Raises:
        RuntimeError: another version of triton than this was written for.
    """
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if triton.__version__ != VERSION:
        raise RuntimeError(f"written for triton {VERSION}, this is {triton.__version__}: look at its interpreter first")
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "mended", False):
        return
    interpreter._convert_float = convert
    binary, unary, dot, cast = builder.binary_op, builder.unary_op, builder.create_dot, builder.cast_impl

    def wide(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return handle(as_torch(operand.data, "bf16").float().numpy(), tl.float32)

    def narrow(result: Any) -> Any:
        """float32 results back to bfloat16; comparisons give booleans and stay."""
        if result.data.dtype == np.bool_:
            return handle(result.data, tl.int1)
        data = as_array(torch.from_numpy(np.ascontiguousarray(result.data, np.float32)).bfloat16(), np.dtype("u2"))
        return handle(data.reshape(result.data.shape), tl.bfloat16)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if lhs.dtype.scalar != tl.bfloat16 or op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return binary(self, lhs, rhs, op)
        return narrow(handle(op(wide(lhs).data, wide(rhs).data), tl.float32))

    def unary_op(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
        if arg.dtype.scalar != tl.bfloat16:
            return unary(self, arg, op)
        return narrow(unary(self, wide(arg), op))

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar.is_floating() and a.dtype.scalar.primitive_bitwidth < 32:
            # products of narrow floats are exact in float32, as on a tensor core
            a, b = (handle(as_torch(t.data, t.dtype.scalar.name).float().numpy(), tl.float32) for t in (a, b))
        elif a.dtype.scalar.is_int():
            a, b = (handle(t.data.astype(np.float64), tl.float64) for t in (a, b))  # numpy multiplies integers slowly
            return handle(np.matmul(a.data, b.data).astype(d.data.dtype) + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *options)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before.is_floating() and after.is_floating() and tl.bfloat16 in (before, after) and before != after:
            return handle(convert(source.data, before, after).view(interpreter._get_np_dtype(after)), after)
        if before == tl.bfloat16:
            return cast(self, wide(source), target)
        if after == tl.bfloat16:
            return narrow(cast(self, source, tl.float32))
        return cast(self, source, target)

    builder.binary_op, builder.unary_op, builder.create_dot, builder.cast_impl = binary_op, unary_op, create_dot, cast_impl
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast_impl)

    def get_bf16(self: Any, value: float) -> Any:
        return narrow(handle(np.array([value], dtype=np.float32), tl.float32))

    builder.get_bf16 = get_bf16
    builder.mended = True
