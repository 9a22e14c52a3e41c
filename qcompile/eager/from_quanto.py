"""Quanto's state dict and map as ours, so that there is one way in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.eager.layers import describe
from qcompile.formats.quanto import QuantoModule, decode

__all__ = ["translated"]


def translated(
    model: nn.Module, state_dict: Mapping[str, Tensor], quantization_map: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the map that :func:`qcompile.quantization_map` of the same model would give.

    Quanto's map does not say which scales were calibrated; where a scale is exactly 1, as it is before, the input counts as
    not calibrated and the output stays float.

    Raises:
        ValueError: see :func:`qcompile.formats.quanto.decode`; a module that the model does not have, or whose weight Quanto
            cannot have quantized.
    """
    file = decode(state_dict, quantization_map, model)
    tensors: dict[str, Tensor] = dict(file.floats)
    modules: dict[str, Any] = {}
    for path, held in file.modules.items():
        prefix = f"{path}." if path else ""
        weights = {}
        if held.weight is not None:
            layer = describe(model.get_submodule(path))
            arrangement = None if layer is None else layer.weights.get("weight")
            if arrangement is None or arrangement.matrix_shape != held.weight.shape:
                raise ValueError(f"the weight of {path!r}, {list(held.shape)}, is not one that Quanto quantizes")
            weights["weight"] = {
                "scheme": str(held.weight.scheme),
                "arrangement": arrangement.kind,
                "groups": arrangement.groups,
                "optimizer": "max",
            }
            parts = {"_data": held.weight.data, "_scale": held.weight.scale, "_zero": held.weight.zero}
            tensors.update({f"{prefix}weight.{name}": part for name, part in parts.items() if part is not None})
            if held.bias is not None:
                tensors[f"{prefix}bias"] = held.bias
        modules[path] = {
            "weights": weights,
            "activations": None if held.activations is None else held.activations.name,
            "static_input": _calibrated(held, held.input_scale),
            "static_output": _calibrated(held, held.output_scale),
        }
        if held.activations is not None:
            for name, scale in (("input_scale", held.input_scale), ("output_scale", held.output_scale)):
                tensors[prefix + name] = torch.ones(()) if scale is None else scale.float()
    return tensors, {"version": 1, "modules": modules}


def _calibrated(held: QuantoModule, scale: Tensor | None) -> bool:
    return held.activations is not None and scale is not None and float(scale) != 1.0
