"""Activations are rounded on their way into quantized products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qcompile.kernels.dtypes import QType
from qcompile.passes.base import Pass
from qcompile.passes.program import Program, normalized
from qcompile.passes.writes import is_written

qc = torch.ops.qcompile

#: Products whose activations have a token a row of their last axis.
BY_TOKEN = (qc.linear.default, qc.grouped_linear.default)

#: Every product that reads an activation beside its codes.
PRODUCTS = (*BY_TOKEN, qc.conv.default)

ROUNDINGS = (qc.fake_quantize.default, qc.fake_quantize_dynamic.default)


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Round what quantized products read, with one scale a token that is found at run time::

        x ─┬► linear(q)            x ─► fake_quantize_dynamic ─┬► linear(q)
           └► linear(k)     ->                                 └► linear(k)

    Convolutions have no tokens: theirs stay float until :func:`qcompile.calibrate` gives them one scale for all. So do those
    that are rounded already.

    Attributes:
        activations: the quantized dtype; None: the pass does nothing.

    Before: fused. After: every linear and grouped linear reads rounded activations.
    """

    activations: QType | None = None

    def run(self, program: Program) -> int:
        """Rewrite; returns how many products read rounded activations now."""
        if self.activations is None:
            return 0
        made: dict[fx.Node, fx.Node] = {}
        count = 0
        for node in program.calls(*BY_TOKEN):
            x = normalized(node)["x"]
            if x.target in ROUNDINGS:
                continue
            if x not in made or is_written(x):
                # Where the first product reads it: only what is written to in between would make a difference.
                with program.graph.inserting_before(node):
                    made[x] = program.call(qc.fake_quantize_dynamic.default, x, self.activations.name, like=x)
                made[x].meta.pop("decisions", None)
            node.replace_input_with(x, made[x])
            for decision in node.meta.get("decisions", ()):
                decision.activations = f"{self.activations.name} dynamic"
            count += 1
        return count
