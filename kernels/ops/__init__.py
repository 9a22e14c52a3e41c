"""The operators ``torch.ops.qcompile.*``, one a file. Importing this package registers them; nothing else happens."""

from __future__ import annotations

import importlib.util

from qcompile.kernels.ops import conv, dequantize, embedding, grouped, linear, linear_split, quantize

for _name in ("linear_tiled", "linear_tiled_split", "embedding_tiled", "dequantize_tiled"):
    if importlib.util.find_spec(f"qcompile.kernels.ops.{_name}"):
        importlib.import_module(f"qcompile.kernels.ops.{_name}")

__all__ = ["conv", "dequantize", "embedding", "grouped", "linear", "linear_split", "quantize"]
