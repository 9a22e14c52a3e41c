"""``linear_planes`` and its siblings on a GPU: checks, choice of kernel, launch. Imported when first called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from qcompile.kernels.cuda import linear as cuda_linear
from qcompile.kernels.layouts.planes import block_columns
from qcompile.kernels.ops._epilogue import epilogue
from qcompile.kernels.ops.linear_planes import check_linear_planes, check_split
from qcompile.kernels.triton.finish import add_parts
from qcompile.kernels.triton.gemm import gemm
from qcompile.kernels.triton.gemv import gemv
from qcompile.kernels.triton.rows import dequantize_planes
from qcompile.kernels.triton.table import CUDA_ROWS, PANEL, Config, choose, words
from qcompile.kernels.triton.target import target_of


def linear_planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None,
    glu: bool = False,
) -> Tensor:  # fmt: skip
    """See :func:`qcompile.kernels.ops.linear_planes.linear_planes`."""
    check_linear_planes(x, codes, scale, zero, bias, bits, kind, group_size, out_features, activation, mul, add, glu)
    out = x.new_empty([*x.shape[:-1], out_features])
    flat = _matrix(x)
    if out.numel() == 0:
        return out
    if flat.shape[0] <= CUDA_ROWS and cuda_linear.takes(flat, codes, bits, kind, group_size):
        mul, add = (None if t is None else t.contiguous() for t in (mul, add))
        cuda_linear.launch(flat, codes, scale, zero, bias, bits, group_size, out, activation, mul, add, glu)
        return out
    config, split = _choose(flat, codes, bits)
    if config.way == "dense":
        return _dense(x, codes, scale, zero, bias, bits, kind, group_size, activation, mul, add, glu)
    mul, add = (None if t is None else t.contiguous() for t in (mul, add))
    if config.way == "gemm" and split == 1 and not glu:
        _gemm(flat, codes, scale, zero, bits, kind, group_size, config, 1, out, (bias, mul, add, activation))
        return out
    partial = _partial(flat, codes, scale, zero, bits, kind, group_size, config, split)
    add_parts(partial, out.view(-1, out_features), 0, bias, mul, add, activation, glu)
    return out


def linear_planes_split(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """See :func:`qcompile.kernels.ops.linear_planes.linear_planes_split`."""
    check_split(x, codes, scale, zero, bias, bits, kind, group_size, sizes)
    outs = [x.new_empty([*x.shape[:-1], size]) for size in sizes]
    flat = _matrix(x)
    if flat.shape[0] == 0:
        return outs
    if flat.shape[0] <= CUDA_ROWS and cuda_linear.takes(flat, codes, bits, kind, group_size):
        return cuda_linear.launch_split(x, flat, codes, scale, zero, bias, bits, group_size, sizes)
    config, split = _choose(flat, codes, bits)
    if config.way == "dense":
        y = _dense(x, codes, scale, zero, bias, bits, kind, group_size, "none", None, None, False)
        return [part.contiguous() for part in y.split(list(sizes), dim=-1)]
    partial = _partial(flat, codes, scale, zero, bits, kind, group_size, config, split)
    first = 0
    for out, size in zip(outs, sizes, strict=True):
        add_parts(partial, out.view(-1, size), first, bias, None, None, "none", False)
        first += size
    return outs


def _matrix(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _choose(flat: Tensor, codes: Tensor, bits: int) -> tuple[Config, int]:
    target = target_of(flat.device)
    return choose(target, flat.shape[0], codes.shape[0], flat.shape[1], bits, flat.dtype == torch.float32)


def zero_mode(zero: Tensor | None) -> str:
    """The kernels' name for a zero point: ``none``, ``codes`` or ``shift``."""
    return "none" if zero is None else "codes" if zero.dtype == torch.uint8 else "shift"


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """How activations of this dtype are multiplied: float32 exactly enough for float32 (three products of tf32), or as torch
    is allowed to."""
    if dtype != torch.float32 or target_of(device).hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _partial(
    flat: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int,
    config: Config, split: int,
) -> Tensor:  # fmt: skip
    """float32 ``[split, M, N]`` that add up to the product."""
    (rows, cols), n = flat.shape, codes.shape[0]
    partial = flat.new_empty((split, rows, n), dtype=torch.float32)
    if config.way == "gemm":
        _gemm(flat, codes, scale, zero, bits, kind, group_size, config, split, partial, None)
        return partial
    columns = block_columns(bits)
    blocks = -(-cols // columns)
    by_words, register = words(target_of(flat.device), bits, kind)
    each = triton.cdiv(triton.cdiv(blocks, config.bb), split) * config.bb
    gemv[(triton.cdiv(n, config.bn), split)](
        flat, codes, scale, scale if zero is None else zero, partial, n, cols, flat.stride(0), codes.shape[1], blocks,
        scale.shape[1], each, register, ROWS=rows, BITS=bits, KIND=kind, ZERO=zero_mode(zero),
        GROUP=group_size if group_size < cols else 0, BN=config.bn, BB=config.bb, EVEN=cols % columns == 0,
        WORDS=by_words, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partial


_Epilogue = tuple[Tensor | None, Tensor | None, Tensor | None, str]


def _gemm(
    flat: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int,
    config: Config, split: int, out: Tensor, epilogue: _Epilogue | None,
) -> None:  # fmt: skip
    (rows, cols), n = flat.shape, codes.shape[0]
    columns = block_columns(bits)
    blocks = -(-cols // columns)
    bias, mul, add, activation = epilogue or (None, None, None, "none")
    grid = (triton.cdiv(n, config.bn) * triton.cdiv(rows, config.bm), split)
    gemm[grid](
        flat, codes, scale, scale if zero is None else zero, scale if bias is None else bias,
        flat if mul is None else mul, flat if add is None else add, out, rows, n, cols, flat.stride(0), codes.shape[1],
        blocks, scale.shape[1], triton.cdiv(blocks, split), BITS=bits, KIND=kind, ZERO=zero_mode(zero),
        GROUP=group_size if group_size < cols else 0, EVEN=cols % columns == 0, BN=config.bn, BM=config.bm, PANEL=PANEL,
        WHOLE=epilogue is not None, ACTIVATION=activation, HAS_BIAS=bias is not None, HAS_MUL=mul is not None,
        HAS_ADD=add is not None, PRECISION=precision(flat.dtype, flat.device), HIP=target_of(flat.device).hip,
        PARTS=config.parts, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _dense(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, activation: str, mul: Tensor | None, add: Tensor | None, glu: bool,
) -> Tensor:  # fmt: skip
    """Decode once, then the vendor's matmul."""
    weight = dequantize_planes(codes, scale, zero, bits, kind, group_size, x.shape[-1], x.dtype)
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return epilogue(y, activation, mul, add, glu).contiguous()
