"""The report's rows for an eager module: each weight that is quantized, and why the others are not."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qcompile.eager.convolution import convolution_of
from qcompile.eager.layers import Layer, describe
from qcompile.eager.mixin import Plan, QModuleMixin
from qcompile.eager.modules import QConv1d, QConv2d
from qcompile.eager.quantize import Request, places_of, reason_for
from qcompile.eager.weight import CHILD, QWeight
from qcompile.passes.decision import Decision

__all__ = ["rows_of_module"]

#: What a weight that is still float, and trained, is computed with.
TRAINED = "fake quantize, then float (freeze to hold codes)"


def rows_of_module(model: nn.Module) -> list[Decision]:
    """A row for each weight, in the order of the modules; empty where nothing is quantized."""
    if not any(isinstance(m, QModuleMixin) for m in model.modules()):
        return []
    request = model.__dict__.get("q_request")
    rows: list[Decision] = []
    held: set[int] = set()
    layers = {id(p.module): p for p in places_of(model)}
    for path, module in model.named_modules():
        place = layers.get(id(module))
        names = [*(place.layer.weights if place else ()), *(place.layer.unsure if place else ())]
        plans = module.q.plans if isinstance(module, QModuleMixin) else {}
        for name in dict.fromkeys((*plans, *names)):
            if name in plans:
                row = _quantized(module, path, name, plans[name], held)
            else:
                parameter = module._parameters.get(name)
                if parameter is None or place is None:
                    continue
                reason = reason_for(place, name, parameter, request) if isinstance(request, Request) else None
                size = parameter.numel() * parameter.element_size()
                arrangement = {**place.layer.weights, **place.layer.unsure}[name]
                row = Decision(
                    _kind(module, place.layer), name, _join(path, name), path, arrangement.matrix_shape,
                    reason=reason or "it was not asked for", float_bytes=size, bytes=size, shared=id(parameter) in held,
                )  # fmt: skip
                held.add(id(parameter))
            rows.append(row)
    return rows


def _quantized(module: QModuleMixin, path: str, name: str, plan: Plan, held: set[int]) -> Decision:
    frozen, shape = module._modules.get(CHILD + name), plan.arrangement.matrix_shape
    parameter = module._parameters.get(name)
    if isinstance(frozen, QWeight):
        source: object = frozen
        kernel = frozen.kernel_name or f"dequantize before the operator ({frozen.refused})"
        if frozen.kernel_name and plan.arrangement.kind not in ("rows", "columns"):
            kernel = f"dequantize ({frozen.kernel_name}) + convolution"
            own = convolution_of(frozen, module).kernel_name if isinstance(module, QConv1d | QConv2d) else None
            if own is not None and module.q.activations is None:
                kernel = f"{own} where that pays, else {kernel}"
        error, size = frozen.error, plan.scheme.nbytes(shape)
        width = frozen.dtype.itemsize
    elif parameter is not None:
        source, kernel, width = parameter, TRAINED, parameter.element_size()
        value, error = plan.measured(parameter)
        size = value.nbytes
    else:
        raise ValueError(f"{_join(path, name)} is neither a parameter nor frozen")
    row = Decision(
        _kind(module, describe(module) or Layer()), name, _join(path, name), path, shape, str(plan.scheme), kernel,
        float_bytes=width * math.prod(plan.arrangement.shape), bytes=size, error=error, shared=id(source) in held,
        activations=_activations(module),
    )  # fmt: skip
    held.add(id(source))
    return row


def _activations(module: QModuleMixin) -> str | None:
    q = module.q
    if q.activations is None or not q.reads:
        return None
    return f"{q.activations} {'static' if q.static_input else 'dynamic'}"


def _kind(module: nn.Module, layer: Layer) -> str:
    if layer.looked_up:
        return "embedding"
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "rnn"
    return "matmul" if layer.unsure else "linear"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
