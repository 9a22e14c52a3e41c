"""``qcompile::planes_product`` and ``codes_product``: products in float32 that are on their way through Inductor.

Linears on GPUs are written out as one of these and an epilogue (``kernels/triton/decompose.py``). The product becomes a
kernel, and Inductor fuses the epilogue into it, together with what follows (``kernels/triton/lowering.py``). Siblings are
one product, and ``split_columns`` of it.

Both products give ``x @ W.T + bias``; with a ``gate``, the name of an activation, the first half of the rows of W is a gate:
``act(x @ Wg.T + bg) * (x @ Wu.T + bu)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.kernels.ops import linear_quantized
from qcompile.kernels.ops._epilogue import check_result, epilogue
from qcompile.kernels.ops._library import define, no_gradient
from qcompile.kernels.ops._planes import check_planes, dequantize_planes_rows
from qcompile.kernels.ops._tiled import check_bias, check_input

_PLANES, _CODES = "qcompile::planes_product", "qcompile::codes_product"


def planes_product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, gate: str | None = None,
) -> Tensor:  # fmt: skip
    """The product with a weight in the planes layout; the reference.

    Args:
        x: ``[M, K]`` float32, float16 or bfloat16.
        codes, scale, zero, bias, bits, kind, group_size: as ``linear_planes`` has them.

    Returns:
        float32 ``[M, N]``, contiguous; ``[M, N / 2]`` with a gate.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _check_planes(x, codes, scale, zero, bias, bits, kind, group_size, gate)
    weight = dequantize_planes_rows(codes, scale, zero, bits, kind, group_size, x.shape[1])
    return _finished(x.float() @ weight.T, bias, gate)


def codes_product(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], gate: str | None = None,
) -> Tensor:  # fmt: skip
    """The product of codes, arguments as ``linear_quantized`` has them, x ``[M, K]``; the reference.

    Returns float32 ``[M, N]``, contiguous; ``[M, N / 2]`` with a gate.
    """
    _check_codes(x, x_scale, data, scale, bias, x_scheme, scheme, shape, gate)
    y = linear_quantized.linear_quantized(x, x_scale, data, scale, None, x_scheme, scheme, shape, torch.float32)
    return _finished(y, bias, gate)


def split_columns(y: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Parts of ``sizes`` along the last axis, each a contiguous tensor of its own."""
    return [part.clone(memory_format=torch.contiguous_format) for part in y.split(list(sizes), dim=-1)]


def _finished(y: Tensor, bias: Tensor | None, gate: str | None) -> Tensor:
    y = y if bias is None else y + bias
    return y if gate is None else epilogue(y, gate, None, None, glu=True)


def _check_planes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, gate: str | None = None,
) -> None:  # fmt: skip
    check_input(_PLANES, x)
    if x.dim() != 2 or codes.dim() != 2:
        raise ValueError(f"{_PLANES}: x and codes must be matrices, got {list(x.shape)} and {list(codes.shape)}")
    check_planes(_PLANES, codes, scale, zero, bits, kind, group_size, (codes.shape[0],), x.shape[1])
    check_bias(_PLANES, bias, x, codes.shape[0])
    _check_gate(_PLANES, codes.shape[0], gate)


def _check_codes(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], gate: str | None = None,
) -> None:  # fmt: skip
    linear_quantized.check_product(x, x_scale, data, scale, x_scheme, scheme, shape)
    if x.dim() != 2:
        raise ValueError(f"{_CODES}: x must be a matrix, got {list(x.shape)}")
    _check_gate(_CODES, shape[0], gate)


def _check_gate(op: str, rows: int, gate: str | None) -> None:
    if gate is None:
        return
    check_result(op, rows // 2, gate)
    if rows % 2:
        raise ValueError(f"{op}: gate and up must have as many rows each, got {rows} in all")


def _planes_fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, gate: str | None = None,
) -> Tensor:  # fmt: skip
    _check_planes(x, codes, scale, zero, bias, bits, kind, group_size, gate)
    return x.new_empty([x.shape[0], codes.shape[0] // (1 if gate is None else 2)], dtype=torch.float32)


def _codes_fake(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], gate: str | None = None,
) -> Tensor:  # fmt: skip
    _check_codes(x, x_scale, data, scale, bias, x_scheme, scheme, shape, gate)
    return x.new_empty([x.shape[0], shape[0] // (1 if gate is None else 2)], dtype=torch.float32)


def _split_fake(y: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [y.new_empty([*y.shape[:-1], size]) for size in sizes]


_REASON = "the linear that is written out as it has one"
define(
    "planes_product(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, str kind, int group_size, "
    "str? gate=None) -> Tensor",
    planes_product,
    _planes_fake,
    backward=no_gradient("planes_product", _REASON),
)
define(
    "codes_product(Tensor x, Tensor x_scale, Tensor data, Tensor scale, Tensor? bias, str x_scheme, str scheme, "
    "int[] shape, str? gate=None) -> Tensor",
    codes_product,
    _codes_fake,
    backward=no_gradient("codes_product", _REASON),
)
define(
    "split_columns(Tensor y, int[] sizes) -> Tensor[]",
    split_columns,
    _split_fake,
    backward=no_gradient("split_columns", _REASON),
)
