"""Other libraries' 4-bit linears, where they are installed: one function each, from a shape to a call.

None of this was run on a GPU by us; an interface that has changed makes its rows say so, and no others.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

Made = tuple[Callable[[torch.Tensor], Any], int, torch.dtype]
_GROUP = 128


def _needed(module: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise LookupError(f"{module} is not installed")
    return importlib.import_module(module)


def _torchao(n: int, k: int, device: str) -> Made:
    quantization = _needed("torchao.quantization") if importlib.util.find_spec("torchao") else _needed("torchao")
    layer = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device))
    quantization.quantize_(layer, quantization.Int4WeightOnlyConfig(group_size=_GROUP))
    return _no_grad(layer), n * k // 2, torch.bfloat16


def _gemlite(n: int, k: int, device: str) -> Made:
    _needed("gemlite")
    core = importlib.import_module("gemlite.core")
    half = core.DType.FP16
    layer = core.GemLiteLinear(4, group_size=_GROUP, in_features=k, out_features=n, input_dtype=half, output_dtype=half)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scale = torch.full((n * k // _GROUP, 1), 0.01, dtype=torch.float16, device=device)
    layer.pack(codes, scale, torch.full_like(scale, 8), None)
    return layer, n * k // 2, torch.float16


def _bitsandbytes(n: int, k: int, device: str) -> Made:
    library = _needed("bitsandbytes")
    layer = library.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float16, quant_type="nf4")
    return _no_grad(layer.to(device)), n * k // 2, torch.float16


def _marlin(n: int, k: int, device: str) -> Made:
    library = _needed("marlin")
    layer = library.Layer(k, n, groupsize=_GROUP).to(device)
    layer.B.random_(-(2**31), 2**31 - 1)
    layer.s.fill_(0.01)
    return layer, n * k // 2, torch.float16


def _no_grad(layer: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    def call(x: torch.Tensor) -> Any:
        with torch.no_grad():
            return layer(x)

    return call


PEERS: dict[str, Callable[[int, int, str], Made]] = {
    "torchao int4": _torchao,
    "gemlite int4": _gemlite,
    "bitsandbytes nf4": _bitsandbytes,
    "Marlin int4": _marlin,
}
