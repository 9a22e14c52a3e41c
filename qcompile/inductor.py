"""What Inductor is told, once, before the first program is handed to it.

Operators that have a kernel go through as they are. Those without one are written out in plain torch, so that Inductor
generates the code: slower than a kernel, correct on every device, and no Python in the compiled program.
"""

from __future__ import annotations

import functools

import torch

from qcompile.kernels.ops.conv import conv
from qcompile.kernels.ops.dequantize import dequantize
from qcompile.kernels.ops.embedding import embedding
from qcompile.kernels.ops.grouped import grouped_linear
from qcompile.kernels.ops.linear import linear
from qcompile.kernels.ops.linear_split import linear_split

qc = torch.ops.qcompile


@functools.cache
def prepare() -> None:
    """Register the decompositions of operators without a kernel."""
    from torch._inductor.decomposition import register_decomposition

    for target, reference in (
        (qc.dequantize.default, dequantize),
        (qc.linear.default, linear),
        (qc.linear_split.default, linear_split),
        (qc.conv.default, conv),
        (qc.embedding.default, embedding),
        (qc.grouped_linear.default, grouped_linear),
    ):
        register_decomposition([target])(reference)
