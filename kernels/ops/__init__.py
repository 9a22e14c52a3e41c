"""The operators ``torch.ops.qcompile.*``, one a file. Importing this package registers them; nothing else happens."""

from __future__ import annotations

from qcompile.kernels.ops import (
    attention,
    conv,
    conv_depthwise,
    conv_tiled,
    dequantize,
    dequantize_tiled,
    embedding,
    embedding_tiled,
    fake_quantize,
    fake_quantize_weight,
    grouped,
    grouped_planes,
    hold,
    linear,
    linear_chain,
    linear_planes,
    linear_quantized,
    linear_rows,
    linear_split,
    linear_tiled,
    linear_tiled_split,
    norm_quantize,
    products,
    quantize,
    quantize_weight,
    rows_planes,
    sequence,
)

__all__ = [
    "attention", "conv", "conv_depthwise", "conv_tiled", "dequantize", "dequantize_tiled", "embedding", "embedding_tiled",
    "fake_quantize", "fake_quantize_weight", "grouped", "grouped_planes", "hold", "linear", "linear_chain", "linear_planes",
    "linear_quantized", "linear_rows", "linear_split", "linear_tiled", "linear_tiled_split", "norm_quantize",
    "products", "quantize", "quantize_weight", "rows_planes", "sequence",
]  # fmt: skip
