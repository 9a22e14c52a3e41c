"""``qcompile::linear_tiled_static``: a linear on a packed weight whose activations have one scale that is known beforehand.

``y = (x_scale * clamp(round(x / x_scale), -127, 127)) @ W.T + bias``: int8 times the weight's codes. The reference rounds x
in float32 and decodes the weight; the CPU kernel multiplies codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.layouts.tiled import TILE
from qcompile.kernels.ops._library import define
from qcompile.kernels.ops._tiled import ceil_div, check_bias, check_input, check_weight, dequantize_rows

_OP = "qcompile::linear_tiled_static"

_SCHEMA = (
    "linear_tiled_static(Tensor x, Tensor x_scale, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, "
    "int group_size, int out_features) -> Tensor"
)


def _check(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
    group_size: int, out_features: int,
) -> None:  # fmt: skip
    check_input(_OP, x)
    if x_scale.dtype != torch.float32 or x_scale.dim() != 0:
        raise ValueError(f"{_OP}: x_scale must be a float32 scalar, got {x_scale.dtype} {list(x_scale.shape)}")
    if out_features < 1:
        raise ValueError(f"{_OP}: out_features must be positive, got {out_features}")
    check_weight(_OP, codes, scale, zero, bits, group_size, ceil_div(out_features, TILE), x.shape[-1])
    check_bias(_OP, bias, x, out_features)


def _fake(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
    group_size: int, out_features: int,
) -> Tensor:  # fmt: skip
    _check(x, x_scale, codes, scale, zero, bias, bits, group_size, out_features)
    return x.new_empty([*x.shape[:-1], out_features])


def linear_tiled_static(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
    group_size: int, out_features: int,
) -> Tensor:  # fmt: skip
    """The reference, in plain torch and float32 (see the module's docstring); raises ValueError on a mismatch.

    Args:
        x: ``[..., in_features]``. Infinity saturates, NaN gives NaN.
        x_scale: float32 scalar, in [1e-36, 1e36].
    """
    _check(x, x_scale, codes, scale, zero, bias, bits, group_size, out_features)
    if not 1e-36 <= float(x_scale) <= 1e36:
        raise ValueError(f"{_OP}: x_scale must be in [1e-36, 1e36], got {float(x_scale)}")
    weight = dequantize_rows(codes, scale, zero, bits, group_size, x.shape[-1])[:out_features]
    rounded = (x.float() / x_scale).round_().clamp_(-127, 127) * x_scale
    return torch.nn.functional.linear(rounded, weight, None if bias is None else bias.float()).to(x.dtype)


# A bare operator, for calls without gradients: a formula, even one that refuses, costs 4 us a call. With gradients
# fake_quantize, which passes them straight through, goes before linear_tiled.
define(_SCHEMA, linear_tiled_static, _fake)
