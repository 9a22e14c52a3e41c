"""Learned step size quantization: the scales of activations as parameters (Esser et al. 2020, "LSQ")."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.eager.mixin import SCALES, QModuleMixin

__all__ = ["learn_scales", "settle_scales"]


def learn_scales(model: nn.Module) -> list[nn.Parameter]:
    """Let training find the scales of calibrated activations: each becomes a parameter, in place, until the model is frozen.

    Modules that are frozen keep the scales that they have.
    Their gradient is that of LSQ, divided by ``sqrt(elements * qmax)`` as there. They are small numbers above zero: give
    them a learning rate to match, a thousandth of a typical scale or so, and no weight decay::

        scales = qcompile.learn_scales(model)
        known = {id(s) for s in scales}
        rest = [p for p in model.parameters() if id(p) not in known]
        optimizer = torch.optim.Adam([{"params": rest}, {"params": scales, "lr": 1e-5}], lr=1e-3)

    Returns:
        The new parameters.

    Raises:
        ValueError: no activation in the model has a scale; quantize with ``activations`` and calibrate first.
    """
    found = []
    for module in model.modules():
        if not isinstance(module, QModuleMixin) or module.q.activations is None:
            continue
        if module.q.plans and module.frozen:
            continue
        for name, static in zip(SCALES, (module.q.static_input, module.q.static_output), strict=True):
            held = module._buffers.get(name)
            if static and held is not None:
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(held.detach().clone()))
            learned = module._parameters.get(name)
            if static and learned is not None:
                found.append(learned)
    if not found:
        raise ValueError(
            "no activation in the model has a scale; qcompile.quantize(model, activations=...), then run samples under "
            "qcompile.Calibration()"
        )
    return found


def settle_scales(module: nn.Module) -> None:
    """Make learned scales buffers again."""
    for name in SCALES:
        scale = module._parameters.get(name)
        if scale is not None:
            value = _above_zero(scale.detach())
            del module._parameters[name]
            module.register_buffer(name, value)


def learned(scale: Tensor, x: Tensor, qmax: float) -> Tensor:
    """The scale that rounds ``x``, through which the parameter gets its share of the gradient."""
    return _Learned.apply(scale, 1 / math.sqrt(max(1, x.numel()) * qmax))


def _above_zero(scale: Tensor) -> Tensor:
    return scale.clamp(min=torch.finfo(torch.float32).tiny * 16)


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return _above_zero(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None
