"""The products of ``decompose.py`` as templates of Inductor's, in the configurations of ``table.py``.

Under ``max_autotune`` Inductor times the table's configuration and its few neighbours, and keeps what it found on disk;
otherwise the table's is taken. Where K is split the template stores the parts, and their sum begins whatever kernel the
epilogue is in: they are added in a fixed order, and results repeat.

Importing this module tells Inductor. It needs Inductor, not Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import (
    fallback_handler,
    lowerings,
    make_fallback,
    register_lowering,
    tag_to_layout_constraint,
    to_dtype,
)
from torch._inductor.select_algorithm import NoValidChoicesError, autotune_select_algorithm, realize_inputs
from torch._inductor.virtualized import V
from torch._library.utils import get_layout_constraint_tag
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.kernels.layouts.logical import group_size as group_of
from qcompile.kernels.layouts.planes import block_columns
from qcompile.kernels.ops._tiled import ACTIVATIONS, ceil_div
from qcompile.kernels.scheme import PerTensor, Scheme
from qcompile.kernels.triton import table
from qcompile.kernels.triton.decompose import UNKNOWN_ROWS, plan
from qcompile.kernels.triton.register_codes import kinds_of
from qcompile.kernels.triton.table import Config
from qcompile.kernels.triton.target import target_of
from qcompile.kernels.triton.templates import TEMPLATES

aten, qc = torch.ops.aten, torch.ops.qcompile


@dataclass(frozen=True)
class Product:
    """A product that is to be a template.

    Attributes:
        template: of ``TEMPLATES``.
        inputs: what it reads, x ``[M, K]`` first, but for the bias.
        n: rows of W.
        configs: the table's configuration, and those to try besides.
        split: parts of K.
        blocks: of K, whose loop ``split`` cuts.
        constants: of the template's text.
    """

    template: str
    inputs: tuple[Any, ...]
    n: int
    configs: tuple[Config, ...]
    split: int
    blocks: int
    constants: dict[str, Any]


def _planes(
    x: Any, codes: Any, scale: Any, zero: Any, bias: Any, bits: int, kind: str, group_size: int, gate: str | None = None
) -> Any:
    """``qcompile::planes_product``."""
    from qcompile.kernels.triton.linear import precision

    device, dtype = x.get_device(), x.get_dtype()
    (rows, cols), (n, _) = map(_integers, (x.get_size(), codes.get_size()))
    op = qc.planes_product.default
    target = target_of(device)
    # never to decode first: where that is to be done it was done before
    hint = min(V.graph.sizevars.optimization_hint(rows, fallback=UNKNOWN_ROWS), table.most_rows(target))
    planned = plan(device, dtype, hint, isinstance(rows, int), n, cols, bits, kind, group_size)
    if planned is None:
        return _call(op, x, codes, scale, zero, bias, bits, kind, group_size, gate)
    config, split = planned
    held = (_rows_of(x), realize_inputs(codes), realize_inputs(scale))
    by_words, register = table.words(target, bits, kind)
    constants = {
        "BITS": bits, "KIND": repr(kind), "GROUP": group_size if group_size < cols else 0,
        "ZERO": repr("none" if zero is None else "codes" if zero.get_dtype() == torch.uint8 else "shift"),
        "EVEN": cols % block_columns(bits) == 0, "PRECISION": repr(precision(dtype, device)), "HIP": target.hip,
        "WORDS": by_words, "REGISTER": register,
    }  # fmt: skip
    y = _finished(
        Product(
            config.way, (*held, held[2] if zero is None else realize_inputs(zero)), n,
            (config, *table.neighbours(target, config, bits, dtype == torch.float32)), split,
            ceil_div(cols, block_columns(bits)), constants,
        ), bias, gate,
    )  # fmt: skip
    return y if y is not None else _call(op, x, codes, scale, zero, bias, bits, kind, group_size, gate)


def _codes(
    x: Any, x_scale: Any, data: Any, scale: Any, bias: Any, x_scheme: str, scheme: str, shape: Sequence[int],
    gate: str | None = None,
) -> Any:  # fmt: skip
    """``qcompile::codes_product``."""
    target, left, right = target_of(x.get_device()), Scheme.parse(x_scheme), Scheme.parse(scheme)
    kind, _, native = kinds_of(left, right, target)
    (rows, cols), n, group = _integers(x.get_size()), int(shape[0]), group_of(right, int(shape[1]))
    y = None
    if x.get_device().type == "cuda" and native:
        hint = V.graph.sizevars.optimization_hint(rows, fallback=UNKNOWN_ROWS)
        config, split, runs = table.quantized(target, hint, n, cols, native, group)
        step = config.bk * runs
        constants = {
            "KIND": repr(kind), "GROUP": group, "GROUPS": ceil_div(cols, group) if group else 1, "BK": config.bk,
            "RUNS": runs, "EVEN": cols % step == 0,
            "X_ROWS": left.granularity != PerTensor(), "W_ROWS": right.granularity != PerTensor(),
        }  # fmt: skip
        inputs = (_rows_of(x), realize_inputs(x_scale), _rows_of(data), realize_inputs(scale))
        tried = (config, *table.smaller(config))
        y = _finished(Product("codes", inputs, n, tried, split, ceil_div(cols, step), constants), bias, gate)
    if y is None:
        return _call(qc.codes_product.default, x, x_scale, data, scale, bias, x_scheme, scheme, shape, gate)
    return y


def _finished(product: Product, bias: Any, gate: str | None) -> Any:
    """The product with its bias, and with its gate if it has one, which is in the template unless K is split."""
    if gate is not None and product.split == 1:
        return _template(product, bias, gate)
    parts = _template(product, None, None)
    if parts is None:
        return None
    bias = None if bias is None else to_dtype(bias, torch.float32)

    def half(first: int, count: int) -> Any:
        y = _sum(parts, first, count)
        if bias is None:
            return y
        return lowerings[aten.add.Tensor](y, lowerings[aten.slice.Tensor](bias, 0, first, first + count))

    if gate is None:
        return half(0, product.n)
    count = product.n // 2
    return lowerings[aten.mul.Tensor](_Lower(_traced(gate)).run(half(0, count)), half(count, count))


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


def _template(product: Product, bias: Any, gate: str | None) -> Any:
    """float32 ``[M, N]``, or ``[split, M, N]``, of a template; None if none of its configurations compiles."""
    x, split = product.inputs[0], product.split
    rows, out = x.get_size()[0], product.n if gate is None else product.n // 2
    inputs = [*product.inputs, product.inputs[0] if bias is None else realize_inputs(bias)]
    layout = ir.FixedLayout(x.get_device(), torch.float32, [rows, out] if split == 1 else [split, rows, out])
    constants = {
        **product.constants, "PANEL": table.PANEL, "SPLIT": split, "BLOCKS": product.blocks, "GLU": gate is not None,
        "HAS_BIAS": bias is not None, "ACTIVATION": repr(gate),
    }  # fmt: skip
    choices: list[Any] = []
    for one in product.configs if inductor.max_autotune or inductor.max_autotune_gemm else product.configs[:1]:
        together = one.bb or 1  # blocks at a time
        TEMPLATES[product.template].maybe_append_choice(
            choices, input_nodes=inputs, layout=layout, call_sizes=[rows, out], num_warps=one.warps, num_stages=one.stages,
            BN=one.bn, BM=one.bm or int(rows), BB=together, PARTS=one.parts, OUT=one.bn if gate is None else one.bn // 2,
            STEPS=ceil_div(ceil_div(product.blocks, together), split) * together, **constants,
        )  # fmt: skip
    try:
        # Chosen at once: a choice put off may fall on one that nothing is fused into.
        name = f"qcompile_{product.template}"
        return autotune_select_algorithm(name, choices, inputs, layout, return_multi_template=False)[0]
    except NoValidChoicesError:
        return None


def _split_columns(y: Any, sizes: Sequence[int]) -> Any:
    """``qcompile::split_columns``: views of one result, so that nobody copies them without need."""
    y.realize()
    return lowerings[aten.split_with_sizes.default](y, sizes, -1)


def _rows_of(x: Any) -> Any:
    """A matrix whose rows are contiguous."""
    return ir.ExternKernel.require_stride_order(x, [1, 0])


def _integers(sizes: Sequence[Any]) -> list[Any]:
    """Sizes, as Python integers where they are fixed."""
    return [size if getattr(size, "free_symbols", ()) else int(size) for size in sizes]


def _call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """The operator itself, called."""
    return fallback_handler(op, add_to_fallback_set=False)(*args)


register_lowering(qc.planes_product.default, type_promotion_kind=None)(_planes)
register_lowering(qc.codes_product.default, type_promotion_kind=None)(_codes)
register_lowering(qc.split_columns.default, type_promotion_kind=None)(_split_columns)
# Where they are not written out they are called; of an operator with a decomposition, Inductor wants to be told.
for _op in (
    qc.linear_planes.default, qc.linear_planes_forward.default, qc.linear_planes_split.default,
    qc.linear_planes_split_forward.default, qc.linear_quantized.default, qc.linear_quantized_split.default,
    qc.norm_quantize.default,
):  # fmt: skip
    _constraint = tag_to_layout_constraint(get_layout_constraint_tag(_op))
    make_fallback(_op, layout_constraint=_constraint, warn=False, override_decomp=True)
