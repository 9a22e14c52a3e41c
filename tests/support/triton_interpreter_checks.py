"""What Triton's interpreter, as mended, computes from every float8 code and from bfloat16: prints {check: held} as JSON."""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl
import triton_interpreter
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # the interpreter has no fnuz type


@triton.jit
def _cast(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def _arithmetic(a, b, total, product, quotient, less, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(total + at, x + y)
    tl.store(product + at, x * y * 0.5)
    tl.store(quotient + at, tl.exp(x.to(tl.float32)).to(tl.bfloat16))
    tl.store(less + at, (x < y).to(tl.int8))


@triton.jit
def _dot(a, b, c, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _cast[(1,)](x, y, SIZE=x.numel())
    return y


def same(got: Tensor, want: Tensor) -> bool:
    return bool(torch.equal(got.float().nan_to_num(-7777.0), want.float().nan_to_num(-7777.0)))


def main() -> None:
    torch.manual_seed(0)
    triton_interpreter.install()
    held: dict[str, bool] = {}
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    spread = torch.randn(1000) * 2.0 ** torch.randint(-20, 20, (1000,))
    values = torch.cat([spread, torch.tensor([0.0, -0.0, 1e30, -1e30] * 6)])
    for dtype in FLOAT8:
        name, codes = str(dtype).removeprefix("torch."), every.view(dtype)
        for wide in (torch.float32, torch.float16, torch.bfloat16):
            held[f"every {name} to {wide}"] = same(cast(codes, wide), codes.to(wide))
        limit = torch.finfo(dtype).max
        held[f"float32 to {name}"] = same(cast(values, dtype), values.clamp(-limit, limit).to(dtype))
        a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
        c = torch.empty(32, 32)
        _dot[(1,)](a, b, c, SIZE=32)
        held[f"{name} x {name}"] = bool(torch.allclose(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5))
    held["float32 to bfloat16"] = same(cast(values, torch.bfloat16), values.bfloat16())
    held["bfloat16 to float32"] = same(cast(values.bfloat16(), torch.float32), values.bfloat16())
    held["bfloat16 to int32"] = same(cast(torch.arange(-64, 64).bfloat16(), torch.int32), torch.arange(-64, 64))
    integers = torch.arange(1024, dtype=torch.int32)
    held["int32 to bfloat16"] = same(cast(integers, torch.bfloat16), integers.bfloat16())
    x, y = (torch.randn(256).bfloat16() for _ in range(2))
    total, product, exponential = (torch.empty(256, dtype=torch.bfloat16) for _ in range(3))
    less = torch.empty(256, dtype=torch.int8)
    _arithmetic[(1,)](x, y, total, product, exponential, less, SIZE=256)
    held["bfloat16 sum"] = same(total, x + y)
    held["bfloat16 product"] = same(product, x * y * 0.5)
    held["bfloat16 exp"] = same(exponential, x.float().exp().bfloat16())
    held["bfloat16 comparison"] = same(less, (x < y).to(torch.int8))
    a, b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    c = torch.empty(32, 32)
    _dot[(1,)](a, b, c, SIZE=32)
    held["bfloat16 dot"] = bool(torch.allclose(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5))
    print(json.dumps(held))


if __name__ == "__main__":
    main()
