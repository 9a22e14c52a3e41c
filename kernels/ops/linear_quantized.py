"""``qcompile::linear_quantized`` and ``linear_quantized_split``: both sides of the product in 8-bit codes.

``y = act(dequantize(x) @ dequantize(W).T + bias) [* mul] [+ add]``, int8 x int8 or float8 x float8; with ``glu``,
``y = act(x @ Wg.T + bg) * (x @ Wu.T + bu) [* mul] [+ add]`` (rows and bias: gate first, then up).
``linear_quantized_split`` gives each of the siblings stacked on N its own result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels import numerics
from qcompile.kernels.ops._epilogue import check_operands, check_result, epilogue
from qcompile.kernels.ops._library import define
from qcompile.kernels.ops.linear import check_features, sum_rows
from qcompile.kernels.qtensor import check_parts
from qcompile.kernels.scheme import PerGroup, Scheme

_OP = "qcompile::linear_quantized"
_SPLIT = "qcompile::linear_quantized_split"
_PRODUCT = (
    "Tensor x, Tensor x_scale, Tensor data, Tensor scale, Tensor? bias, str x_scheme, str scheme, int[] shape, "
    "ScalarType dtype, "
)


def linear_quantized(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], dtype: torch.dtype, activation: str = "none", mul: Tensor | None = None,
    add: Tensor | None = None, glu: bool = False,
) -> Tensor:  # fmt: skip
    """The reference (see the module's docstring).

    Exact up to the float32 rounding of the result: products of codes are summed in float64, which holds every int8 sum.

    Args:
        x, x_scale: codes ``[..., K]`` and their scale, as ``x_scheme`` says.
        data, scale: codes of W of ``shape`` ``[N, K]``, as ``scheme`` says. Both schemes are symmetric, of 8 bits.
        bias: ``[N]``. mul, add: the result's shape and dtype.

    Returns:
        ``[..., N]`` (``[..., N/2]`` with ``glu``) in ``dtype``.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    check_product(x, x_scale, data, scale, x_scheme, scheme, shape)
    check_epilogue(x, shape, dtype, activation, mul, add, glu)
    return epilogue(_product(x, x_scale, data, scale, bias, x_scheme, scheme), activation, mul, add, glu).to(dtype)


def linear_quantized_split(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], dtype: torch.dtype, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The reference: the product cut along its last axis in parts of ``sizes``, each contiguous."""
    check_product(x, x_scale, data, scale, x_scheme, scheme, shape)
    check_sizes(shape, sizes)
    out = _product(x, x_scale, data, scale, bias, x_scheme, scheme)
    return [part.to(dtype, copy=True).contiguous() for part in out.split(list(sizes), dim=-1)]


def check_product(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, x_scheme: str, scheme: str, shape: Sequence[int]
) -> None:
    """Raise ValueError unless codes and scales are two factors that go together."""
    left, right = Scheme.parse(x_scheme), Scheme.parse(scheme)
    for parsed in (left, right):
        if parsed.mode != "symmetric" or parsed.qtype.bits != 8:
            raise ValueError(f"a quantized x quantized matmul takes symmetric 8-bit codes, got scheme {parsed}")
    if left.qtype.is_float != right.qtype.is_float:
        raise ValueError(f"activations in {left.qtype} and weights in {right.qtype} do not go together")
    check_parts(data, scale, None, right, shape)
    check_parts(x, x_scale, None, left, tuple(x.shape))
    check_features(x, shape)


def check_epilogue(
    x: Tensor, shape: Sequence[int], dtype: torch.dtype, activation: str, mul: Tensor | None, add: Tensor | None, glu: bool
) -> None:
    """Raise ValueError unless what follows the product fits it."""
    if glu and shape[0] % 2:
        raise ValueError(f"{_OP}: a gated linear needs an even number of rows, got a weight of shape {list(shape)}")
    features = shape[0] // 2 if glu else shape[0]
    check_result(_OP, features, activation)
    check_operands(_OP, x, features, mul, add, dtype)


def check_sizes(shape: Sequence[int], sizes: Sequence[int]) -> None:
    """Raise ValueError unless ``sizes`` cut the rows of a weight into parts."""
    if sum(sizes) != shape[0] or min(sizes, default=0) < 1:
        raise ValueError(f"{_SPLIT}: sizes {list(sizes)} do not cut a weight of {shape[0]} rows into parts")


def _product(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str
) -> Tensor:
    """In float64."""
    left, right = Scheme.parse(x_scheme), Scheme.parse(scheme)
    wide = torch.float64
    if _one_scale_a_row(left, x.shape[-1]) and str(right.granularity) in ("channel=0", "tensor"):
        out = (x.to(wide) @ data.to(wide).t()) * x_scale.to(wide) * scale.to(wide)
    else:
        out = numerics.decode(x, x_scale, None, left, wide) @ numerics.decode(data, scale, None, right, wide).t()
    return out if bias is None else out + bias


def _one_scale_a_row(scheme: Scheme, features: int) -> bool:
    granularity = scheme.granularity
    return str(granularity) == "tensor" or (isinstance(granularity, PerGroup) and granularity.size >= features > 0)


def _fake(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], dtype: torch.dtype, activation: str = "none", mul: Tensor | None = None,
    add: Tensor | None = None, glu: bool = False,
) -> Tensor:  # fmt: skip
    check_product(x, x_scale, data, scale, x_scheme, scheme, shape)
    check_epilogue(x, shape, dtype, activation, mul, add, glu)
    return x.new_empty((*x.shape[:-1], shape[0] // 2 if glu else shape[0]), dtype=dtype)


def _split_fake(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, x_scheme: str, scheme: str,
    shape: Sequence[int], dtype: torch.dtype, sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    check_product(x, x_scale, data, scale, x_scheme, scheme, shape)
    check_sizes(shape, sizes)
    return [x.new_empty((*x.shape[:-1], size), dtype=dtype) for size in sizes]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor | list[Tensor]) -> None:
    ctx.plain = isinstance(output, Tensor) and inputs[9:] in ((), ("none", None, None, False))
    ctx.count = len(inputs)


def _backward(ctx: Any, grad: Tensor | Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    others = [needed for i, needed in enumerate(ctx.needs_input_grad) if i != 4]
    if any(others) or not ctx.plain:
        raise RuntimeError(
            f"{_OP} has a gradient with respect to its bias only, and no other epilogue: x is in codes; quantize weights "
            "only where activations need gradients"
        )
    grads: list[Tensor | None] = [None] * ctx.count
    grads[4] = sum_rows(grad)  # type: ignore[arg-type]
    return tuple(grads)


define(
    f'linear_quantized({_PRODUCT}str activation="none", Tensor? mul=None, Tensor? add=None, bool glu=False) -> Tensor',
    linear_quantized,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
define(
    f"linear_quantized_split({_PRODUCT}int[] sizes) -> Tensor[]",
    linear_quantized_split,
    _split_fake,
    setup_context=_setup,
    backward=_backward,
)
