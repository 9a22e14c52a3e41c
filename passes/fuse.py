"""``dequantize → op`` becomes one operator that takes codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.kernels.ops.conv import matrix_shape
from qcompile.passes.base import Pass
from qcompile.passes.foreign import GROUPED_MM, registered
from qcompile.passes.program import Program
from qcompile.passes.rewrite import Bindings, Rule, rewrite

aten = torch.ops.aten
qc = torch.ops.qcompile
_SHARED = (qc.dequantize.default, aten.reshape.default, aten.transpose.int, aten.to.dtype)


def _same_dtype(program: Program, node: fx.Node, b: Bindings) -> bool:
    return b["x"].meta["val"].dtype == b["dtype"]


def _plain_conv(program: Program, node: fx.Node, b: Bindings) -> bool:
    return not b["transposed"] and _same_dtype(program, node, b)


def _transposed_conv(program: Program, node: fx.Node, b: Bindings) -> bool:
    matrix = matrix_shape(b["weight_shape"], True, b["groups"])
    return bool(b["transposed"]) and tuple(b["shape"]) == matrix and _same_dtype(program, node, b)


def _with_offsets(grouped_mm: Callable[..., Any]) -> Rule:
    return Rule(
        "grouped_linear_offsets",
        lambda x, data, scale, zero, scheme, shape, dtype, offsets: grouped_mm(
            x, aten.transpose.int(qc.dequantize.default(data, scale, zero, scheme, shape, dtype), 1, 2), offsets
        ),
        lambda x, data, scale, zero, scheme, shape, offsets: qc.grouped_linear.default(
            x, data, scale, zero, offsets, scheme, shape
        ),
        where=_same_dtype,
        shared=_SHARED,
    )


RULES = (
    Rule(
        "cast",
        lambda data, scale, zero, scheme, shape, dtype, to: aten.to.dtype(
            qc.dequantize.default(data, scale, zero, scheme, shape, dtype), to
        ),
        lambda data, scale, zero, scheme, shape, to: qc.dequantize.default(data, scale, zero, scheme, shape, to),
        shared=_SHARED,
    ),
    Rule(
        "linear",
        lambda x, data, scale, zero, scheme, shape, dtype, bias: aten.linear.default(
            x, qc.dequantize.default(data, scale, zero, scheme, shape, dtype), bias
        ),
        lambda x, data, scale, zero, scheme, shape, bias: qc.linear.default(x, data, scale, zero, bias, scheme, shape),
        where=_same_dtype,
        shared=_SHARED,
    ),
    Rule(
        "grouped_linear",
        lambda x, data, scale, zero, scheme, shape, dtype: aten.bmm.default(
            x, aten.transpose.int(qc.dequantize.default(data, scale, zero, scheme, shape, dtype), 1, 2)
        ),
        lambda x, data, scale, zero, scheme, shape: qc.grouped_linear.default(x, data, scale, zero, None, scheme, shape),
        where=_same_dtype,
        shared=_SHARED,
    ),
    _with_offsets(aten._grouped_mm.default),
    Rule(
        "conv",
        lambda x, data, scale, zero, scheme, shape, dtype, weight_shape, bias, s, p, d, transposed, op, g: (
            aten.convolution.default(
                x,
                aten.reshape.default(qc.dequantize.default(data, scale, zero, scheme, shape, dtype), weight_shape),
                bias, s, p, d, transposed, op, g,
            )
        ),
        lambda x, data, scale, zero, scheme, weight_shape, bias, s, p, d, op, g: qc.conv.default(
            x, data, scale, zero, bias, scheme, weight_shape, s, p, d, False, op, g
        ),
        where=_plain_conv,
        shared=_SHARED,
    ),
    Rule(
        "conv_transposed",
        lambda x, data, scale, zero, scheme, shape, dtype, split, weight_shape, bias, s, p, d, transposed, op, groups: (
            aten.convolution.default(
                x,
                aten.reshape.default(
                    aten.transpose.int(
                        aten.reshape.default(qc.dequantize.default(data, scale, zero, scheme, shape, dtype), split), 1, 2
                    ),
                    weight_shape,
                ),
                bias, s, p, d, transposed, op, groups,
            )
        ),
        lambda x, data, scale, zero, scheme, weight_shape, bias, s, p, d, op, groups: qc.conv.default(
            x, data, scale, zero, bias, scheme, weight_shape, s, p, d, True, op, groups
        ),
        where=_transposed_conv,
        shared=_SHARED,
    ),
    Rule(
        "embedding",
        lambda indices, data, scale, zero, scheme, shape, dtype: aten.embedding.default(
            qc.dequantize.default(data, scale, zero, scheme, shape, dtype), indices
        ),
        lambda indices, data, scale, zero, scheme, shape, dtype: qc.embedding.default(
            indices, data, scale, zero, scheme, shape, dtype
        ),
        shared=_SHARED,
    ),
    Rule(
        "index",
        lambda indices, data, scale, zero, scheme, shape, dtype: aten.index.Tensor(
            qc.dequantize.default(data, scale, zero, scheme, shape, dtype), [indices]
        ),
        lambda indices, data, scale, zero, scheme, shape, dtype: qc.embedding.default(
            indices, data, scale, zero, scheme, shape, dtype
        ),
        shared=_SHARED,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse a weight's dequantization into the operator that reads it::

        data, scale, zero ──► dequantize ──► linear(x)     ->     qcompile.linear(x, data, scale, zero)

    and the same for convolution, embedding and batched linear. ``RULES`` is the whole of it,
    but for the same operators under other libraries' names.

    Before: weights are quantized. After: no linear, convolution, embedding or batched linear reads a dequantize.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many operators were fused."""
        counts = rewrite(program, (*RULES, *map(_with_offsets, registered(GROUPED_MM))))
        program.clean()
        return sum(n for name, n in counts.items() if name != "cast")
