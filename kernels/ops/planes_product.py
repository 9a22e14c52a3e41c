"""``qcompile::planes_product``: the bare product with a weight in the planes layout, in float32; and one with a gate.

They stand only in programs on their way through Inductor: ``linear_planes`` is written out as a product, which becomes a
kernel, and its epilogue, which Inductor fuses into that kernel together with what follows (``kernels/triton/lowering.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.ops._epilogue import check_result, epilogue
from qcompile.kernels.ops._library import define, no_gradient
from qcompile.kernels.ops._planes import check_planes, dequantize_planes_rows
from qcompile.kernels.ops._tiled import check_bias, check_input

_OP = "qcompile::planes_product"


def check_product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int, op: str = _OP
) -> None:
    """Raise ValueError unless the arguments of ``planes_product`` fit each other."""
    check_input(op, x)
    if x.dim() != 2 or codes.dim() != 2:
        raise ValueError(f"{op}: x and codes must be matrices, got {list(x.shape)} and {list(codes.shape)}")
    check_planes(op, codes, scale, zero, bits, kind, group_size, (codes.shape[0],), x.shape[1])


def planes_product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int
) -> Tensor:
    """``x @ W.T``; the reference.

    Args:
        x: ``[M, K]`` float32, float16 or bfloat16.
        codes, scale, zero, bits, kind, group_size: as :func:`qcompile.kernels.ops.linear_planes.linear_planes` has them.

    Returns:
        float32 ``[M, N]``, contiguous.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    check_product(x, codes, scale, zero, bits, kind, group_size)
    return x.float() @ dequantize_planes_rows(codes, scale, zero, bits, kind, group_size, x.shape[1]).T


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_size: int
) -> Tensor:
    check_product(x, codes, scale, zero, bits, kind, group_size)
    return x.new_empty([x.shape[0], codes.shape[0]], dtype=torch.float32)


def gated_planes_product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, activation: str,
) -> Tensor:  # fmt: skip
    """``act(x @ Wg.T + bg) * (x @ Wu.T + bu)``, the rows of the gate before those of up; the reference.

    Returns float32 ``[M, N / 2]``; arguments as :func:`planes_product` has them, and bias ``[N]``.
    """
    _check_gated(x, codes, scale, zero, bias, bits, kind, group_size, activation)
    y = planes_product(x, codes, scale, zero, bits, kind, group_size)
    return epilogue(y if bias is None else y + bias, activation, None, None, glu=True)


def _check_gated(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, activation: str,
) -> None:  # fmt: skip
    op = "qcompile::gated_planes_product"
    check_product(x, codes, scale, zero, bits, kind, group_size, op)
    check_result(op, codes.shape[0] // 2, activation)
    check_bias(op, bias, x, codes.shape[0])
    if codes.shape[0] % 2:
        raise ValueError(f"{op}: gate and up must have as many rows each, got {codes.shape[0]} in all")


def _gated_fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, kind: str,
    group_size: int, activation: str,
) -> Tensor:  # fmt: skip
    _check_gated(x, codes, scale, zero, bias, bits, kind, group_size, activation)
    return x.new_empty([x.shape[0], codes.shape[0] // 2], dtype=torch.float32)


_REASON = "linear_planes, which is written out as it, has one"
_WEIGHT = "Tensor x, Tensor codes, Tensor scale, Tensor? zero, "
define(
    f"planes_product({_WEIGHT}int bits, str kind, int group_size) -> Tensor",
    planes_product,
    _fake,
    backward=no_gradient("planes_product", _REASON),
)
define(
    f"gated_planes_product({_WEIGHT}Tensor? bias, int bits, str kind, int group_size, str activation) -> Tensor",
    gated_planes_product,
    _gated_fake,
    backward=no_gradient("gated_planes_product", _REASON),
)
