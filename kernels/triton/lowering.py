"""The products of ``decompose.py`` as templates of Inductor's, in the configurations of ``table.py``.

Under ``max_autotune`` Inductor times the table's configuration and its few neighbours, and keeps what it found on disk;
otherwise the table's is taken. Where K is split the template stores the parts, and their sum begins whatever kernel the
epilogue is in: they are added in a fixed order, and results repeat.

Importing this module tells Inductor. It needs Inductor, not Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import fallback_handler, lowerings, make_fallback, register_lowering, to_dtype
from torch._inductor.select_algorithm import NoValidChoicesError, autotune_select_algorithm, realize_inputs
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.kernels.layouts.planes import block_columns
from qcompile.kernels.ops._tiled import ACTIVATIONS, ceil_div
from qcompile.kernels.triton.decompose import UNKNOWN_ROWS, plan
from qcompile.kernels.triton.table import PANEL, Config, most_rows, neighbours
from qcompile.kernels.triton.target import Target, target_of
from qcompile.kernels.triton.templates import TEMPLATES

aten, qc = torch.ops.aten, torch.ops.qcompile


def _planned(x: Any, codes: Any, bits: int, kind: str, group_size: int) -> tuple[Config, int] | None:
    """As :func:`plan` says, of a matrix x; never to decode first, which was done before where it is to be done."""
    rows, cols = x.get_size()
    hint = min(V.graph.sizevars.optimization_hint(rows, fallback=UNKNOWN_ROWS), most_rows(target_of(x.get_device())))
    fixed = not getattr(rows, "free_symbols", ())
    return plan(x.get_device(), x.get_dtype(), hint, fixed, int(codes.get_size()[0]), int(cols), bits, kind, group_size)


def _product(x: Any, codes: Any, scale: Any, zero: Any, bits: int, kind: str, group_size: int) -> Any:
    """``qcompile::planes_product``."""
    planned = _planned(x, codes, bits, kind, group_size)
    parts = None if planned is None else _template(planned, x, codes, scale, zero, None, bits, kind, group_size, None)
    if parts is None:
        return _call(qc.planes_product.default, x, codes, scale, zero, bits, kind, group_size)
    return _sum(parts, 0, codes.get_size()[0])


def _gated(
    x: Any, codes: Any, scale: Any, zero: Any, bias: Any, bits: int, kind: str, group_size: int, activation: str
) -> Any:
    """``qcompile::gated_planes_product``: the gate in the template, or, with K split, where the parts are added up."""
    planned = _planned(x, codes, bits, kind, group_size)
    inside = activation if planned is not None and planned[1] == 1 else None
    y = None if planned is None else _template(planned, x, codes, scale, zero, bias, bits, kind, group_size, inside)
    if y is None:
        return _call(qc.gated_planes_product.default, x, codes, scale, zero, bias, bits, kind, group_size, activation)
    if inside is not None:
        return y
    count = codes.get_size()[0] // 2
    gate, up = _sum(y, 0, count), _sum(y, count, count)
    if bias is not None:
        bias = to_dtype(bias, torch.float32)
        gate, up = (lowerings[aten.add.Tensor](half, lowerings[aten.slice.Tensor](bias, 0, first, first + count))
                    for half, first in ((gate, 0), (up, count)))  # fmt: skip
    return lowerings[aten.mul.Tensor](_Lower(_traced(activation)).run(gate), up)


def _sum(parts: Any, first: int, count: int) -> Any:
    """``count`` columns from ``first`` on of ``[M, N]``, or of what ``[split, M, N]`` add up to, in this order."""
    *split, rows, n = parts.get_size()
    if not split and count == n:
        return parts
    load = parts.make_loader()

    def total(index: Sequence[Any]) -> Any:
        places = [[*part, index[0], index[1] + first] for part in (zip(range(int(split[0]))) if split else ((),))]
        return functools.reduce(lambda y, place: y + load(place), places[1:], load(places[0]))

    return ir.Pointwise.create(device=parts.get_device(), dtype=torch.float32, inner_fn=total, ranges=[rows, count])


@functools.cache
def _traced(activation: str) -> fx.GraphModule:
    """An activation in operators that Inductor has lowerings for."""
    trace = make_fx(lambda y: ACTIVATIONS[activation](y), decomposition_table=select_decomp_table())
    return trace(torch.zeros(1))


class _Lower(fx.Interpreter):
    """Runs a graph of operators on what Inductor has in the place of tensors."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operator's lowering."""
        return lowerings[target](*args, **kwargs)


def _siblings(
    x: Any, codes: Any, scale: Any, zero: Any, bias: Any, bits: int, kind: str, group_size: int, sizes: Sequence[int]
) -> Any:
    """``qcompile::linear_planes_split``: views of one result, so that nobody copies them without need."""
    *lead, cols = x.get_size()
    flat = lowerings[aten.view.default](x, [sympy_product(lead), cols])
    if _planned(flat, codes, bits, kind, group_size) is None:
        op = qc.linear_planes_split_forward.default
        return _call(op, x, codes, scale, zero, bias, bits, kind, group_size, sizes)
    y = _product(flat, codes, scale, zero, bits, kind, group_size)
    y = y if bias is None else lowerings[aten.add.Tensor](y, bias)
    y = lowerings[aten.view.default](to_dtype(y, x.get_dtype()), [*lead, codes.get_size()[0]])
    y.realize()
    return lowerings[aten.split_with_sizes.default](y, sizes, -1)


def _call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """The operator itself, called."""
    return fallback_handler(op, add_to_fallback_set=False)(*args)


def _template(
    planned: tuple[Config, int], x: Any, codes: Any, scale: Any, zero: Any, bias: Any, bits: int, kind: str, group_size: int,
    activation: str | None,
) -> Any:  # fmt: skip
    """The result float32 ``[M, N]``, or ``[split, M, N]``, of a template; None if none of its configurations compiles.

    activation: None of a product without a gate.
    """
    from qcompile.kernels.triton.linear import precision

    config, split = planned
    device, dtype, gated = x.get_device(), x.get_dtype(), activation is not None
    (rows, cols), n = x.get_size(), int(codes.get_size()[0])
    x, codes, scale = ir.ExternKernel.require_stride_order(x, [1, 0]), realize_inputs(codes), realize_inputs(scale)
    inputs = [x, codes, scale, *(scale if part is None else realize_inputs(part) for part in (zero, bias))]
    out = n // 2 if gated else n
    layout = ir.FixedLayout(device, torch.float32, [rows, out] if split == 1 else [split, rows, out])
    blocks = ceil_div(int(cols), block_columns(bits))
    constants = {
        "PANEL": PANEL, "SPLIT": split, "BLOCKS": blocks, "BITS": bits, "KIND": repr(kind),
        "ZERO": repr("none" if zero is None else "codes" if zero.get_dtype() == torch.uint8 else "shift"),
        "GROUP": group_size if group_size < cols else 0, "EVEN": int(cols) % block_columns(bits) == 0, "GLU": gated,
        "HAS_BIAS": bias is not None, "ACTIVATION": repr(activation), "PRECISION": repr(precision(dtype, device)),
    }  # fmt: skip
    choices: list[Any] = []
    for one in _tried(config, target_of(device), bits, dtype):
        together = one.bb or 1  # blocks of K at a time
        TEMPLATES[one.way].maybe_append_choice(
            choices, input_nodes=inputs, layout=layout, call_sizes=[rows, out], num_warps=one.warps, num_stages=one.stages,
            BN=one.bn, BM=one.bm or int(rows), BB=together, OUT=one.bn // 2 if gated else one.bn,
            STEPS=ceil_div(ceil_div(blocks, together), split) * together, **constants,
        )  # fmt: skip
    try:
        # Chosen at once: a choice put off may fall on one that nothing is fused into.
        name = f"qcompile_{config.way}"
        return autotune_select_algorithm(name, choices, inputs, layout, return_multi_template=False)[0]
    except NoValidChoicesError:
        return None


def _tried(config: Config, target: Target, bits: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """The table's configuration first; alone, unless Inductor was asked to look for the best."""
    if not (inductor.max_autotune or inductor.max_autotune_gemm):
        return (config,)
    return config, *neighbours(target, config, bits, dtype == torch.float32)


for _op, _lowering in (
    (qc.planes_product.default, _product),
    (qc.gated_planes_product.default, _gated),
    (qc.linear_planes_split.default, _siblings),
    (qc.linear_planes_split_forward.default, _siblings),
):
    register_lowering(_op, type_promotion_kind=None)(_lowering)
for _op in (qc.linear_planes.default, qc.linear_planes_forward.default):
    # where it was not written out; of an operator with a decomposition, Inductor wants to be told
    make_fallback(_op, warn=False, override_decomp=True)
