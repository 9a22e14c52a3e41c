"""``qcompile::linear_rows`` and ``linear_rows_split``: linears on a weight in the ``rows`` layout, with their epilogue.

``y = act(x @ W.T + bias) [* mul] [+ add]``; with ``glu``, ``y = act(x @ Wg.T + bg) * (x @ Wu.T + bu) [* mul] [+ add]``
(rows and bias: gate first, then up). ``linear_rows_split`` gives each of the siblings stacked on N its own result. The
references decode the weight and multiply in float32; kernels are registered per device (``kernels/metal``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.layouts import rows
from qcompile.kernels.ops._epilogue import check_operands, check_result, epilogue
from qcompile.kernels.ops._tiled import ACTIVATIONS, activation_backward, check_bias, check_input, define_differentiable

_OP = "qcompile::linear_rows"
_SPLIT = "qcompile::linear_rows_split"


def check_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    out_features: int, activation: str, mul: Tensor | None, add: Tensor | None, glu: bool,
) -> None:  # fmt: skip
    """Raise ValueError unless the arguments of ``linear_rows`` fit each other."""
    check_input(_OP, x)
    check_result(_OP, out_features, activation)
    all_rows = out_features * (2 if glu else 1)
    rows.check(_OP, codes, scale, zero, bits, group_size, all_rows, x.shape[-1])
    check_bias(_OP, bias, x, all_rows)
    check_operands(_OP, x, out_features, mul, add)


def check_split(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    sizes: Sequence[int],
) -> None:  # fmt: skip
    """Raise ValueError unless the arguments of ``linear_rows_split`` fit each other."""
    check_input(_SPLIT, x)
    if not sizes or any(s < 1 for s in sizes):
        raise ValueError(f"{_SPLIT}: sizes must be one or more positive row counts, got {list(sizes)}")
    rows.check(_SPLIT, codes, scale, zero, bits, group_size, sum(sizes), x.shape[-1])
    check_bias(_SPLIT, bias, x, sum(sizes))


def linear_rows(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None, glu: bool = False,
) -> Tensor:  # fmt: skip
    """The reference, in plain torch and float32 (see the module's docstring); raises ValueError on a mismatch."""
    check_linear(x, codes, scale, zero, bias, bits, group_size, out_features, activation, mul, add, glu)
    out = _product(x, codes, scale, zero, bias, bits, group_size)
    return epilogue(out, activation, mul, add, glu).to(x.dtype).contiguous()


def linear_rows_split(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The reference, in plain torch and float32; each result is contiguous. Raises ValueError on a mismatch."""
    check_split(x, codes, scale, zero, bias, bits, group_size, sizes)
    out = _product(x, codes, scale, zero, bias, bits, group_size)
    return [part.to(x.dtype, copy=True).contiguous() for part in out.split(list(sizes), dim=-1)]


def _product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    weight = rows.dequantize(codes, scale, zero, bits, group_size, x.shape[-1])
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    out_features: int, activation: str = "none", mul: Tensor | None = None, add: Tensor | None = None, glu: bool = False,
) -> Tensor:  # fmt: skip
    check_linear(x, codes, scale, zero, bias, bits, group_size, out_features, activation, mul, add, glu)
    return x.new_empty([*x.shape[:-1], out_features])


def _split_fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group_size: int,
    sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    check_split(x, codes, scale, zero, bias, bits, group_size, sizes)
    return [x.new_empty([*x.shape[:-1], size]) for size in sizes]


def _setup(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, codes, scale, zero, bias, bits, group_size, _out_features, activation, mul, add, glu = inputs
    ctx.save_for_backward(x, codes, scale, zero, bias, mul)
    ctx.options = bits, group_size, activation, glu
    ctx.has_add = add is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients for x, bias, mul and add, with the decoded float weight; pre-activations are computed again."""
    x, codes, scale, zero, bias, mul = ctx.saved_tensors
    bits, group_size, activation, glu = ctx.options
    weight = rows.dequantize(codes, scale, zero, bits, group_size, x.shape[-1])
    grad_y, grad_mul = grad.float(), None
    if activation != "none" or glu or mul is not None:
        pre = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
        gate, up = pre.chunk(2, dim=-1) if glu else (pre, None)
        activated = ACTIVATIONS[activation](gate)
        if mul is not None:
            grad_mul = (grad_y * (activated if up is None else activated * up)).to(mul.dtype)
            grad_y = grad_y * mul
        if up is None:
            grad_y = activation_backward(activation, grad_y, gate)
        else:
            grad_y = torch.cat([activation_backward(activation, grad_y * up, gate), grad_y * activated], dim=-1)
    grad_x = (grad_y @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_bias = None
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(bias.dtype)
    return grad_x, None, None, None, grad_bias, None, None, None, None, grad_mul, grad if ctx.has_add else None, None


def _split_setup(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, codes, scale, zero, bias, bits, group_size, _sizes = inputs
    ctx.save_for_backward(x, codes, scale, zero, bias)
    ctx.options = bits, group_size


def _split_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    x, codes, scale, zero, bias = ctx.saved_tensors
    bits, group_size = ctx.options
    grad_y = torch.cat([g.float() for g in grads], dim=-1)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad_y @ rows.dequantize(codes, scale, zero, bits, group_size, x.shape[-1])).to(x.dtype)
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(bias.dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


define_differentiable(
    "linear_rows(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    'int out_features, str activation="none", Tensor? mul=None, Tensor? add=None, bool glu=False) -> Tensor',
    linear_rows, _fake, _setup, _backward,
)  # fmt: skip
define_differentiable(
    "linear_rows_split(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    "int[] sizes) -> Tensor[]",
    linear_rows_split, _split_fake, _split_setup, _split_backward,
)  # fmt: skip
