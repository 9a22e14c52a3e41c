"""What follows the product in a linear on a packed weight, whatever the layout: its checks, and itself in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.ops._tiled import ACTIVATIONS


def check_result(op: str, out_features: int, activation: str) -> None:
    """Raise ValueError unless there is such an activation, and something to compute."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if out_features < 1:
        raise ValueError(f"{op}: out_features must be positive, got {out_features}")


def check_operands(
    op: str, x: Tensor, out_features: int, mul: Tensor | None, add: Tensor | None, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless ``mul`` and ``add`` have the result's shape and dtype; None: the dtype is that of x."""
    shape = [*x.shape[:-1], out_features]
    for name, operand in (("mul", mul), ("add", add)):
        if operand is None:
            continue
        if operand.dim() != len(shape) or any(a != b for a, b in zip(operand.shape, shape, strict=True)):
            raise ValueError(f"{op}: {name} must have the output's shape {shape}, got {list(operand.shape)}")
        if operand.dtype != (dtype or x.dtype):
            wanted = f"{x.dtype} like x" if dtype is None else f"{dtype} like the result"
            raise ValueError(f"{op}: {name} must be {wanted}, got {operand.dtype}")


def epilogue(y: Tensor, activation: str, mul: Tensor | None, add: Tensor | None, glu: bool) -> Tensor:
    """``act(y) [* mul] [+ add]``; with ``glu``, y is gate and up side by side and counts as ``act(gate) * up``."""
    if glu:
        gate, up = y.chunk(2, dim=-1)
        y = ACTIVATIONS[activation](gate) * up
    else:
        y = ACTIVATIONS[activation](y)
    y = y if mul is None else y * mul
    return y if add is None else y + add
