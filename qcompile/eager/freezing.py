"""``freeze``: codes take the place of float weights."""

from __future__ import annotations

import logging

from torch import nn

from qcompile.eager.learned import settle_scales
from qcompile.eager.mixin import Plan, QModuleMixin
from qcompile.eager.weight import CHILD, QWeight
from qcompile.kernels.memory import Meter
from qcompile.progress import track

__all__ = ["freeze"]

log = logging.getLogger("qcompile.eager")


def freeze(model: nn.Module) -> nn.Module:
    """Hold the codes of each quantized weight in the place of its float values, in place.

    The float values are given up: memory falls to that of the codes, no gradient flows to a weight any more, and no
    optimizer step changes it. Everything else stays trainable. A weight that several modules share is held once. What was
    frozen before stays as it is. Scales that :func:`qcompile.learn_scales` made parameters keep their value. Activations
    that were not calibrated are quantized token by token from now on, too.

    Args:
        model: what :func:`qcompile.quantize` returned, or a part of it.

    Returns:
        The model.

    Raises:
        ValueError: nothing in the model is quantized, or a weight holds NaN or infinity (its name is in the message).

    Example:
        >>> import torch, qcompile
        >>> model = qcompile.quantize(torch.nn.Linear(64, 64), weights="qint4")
        >>> list(qcompile.freeze(model).state_dict())
        ['bias', 'weight._data', 'weight._scale', 'weight._zero']
    """
    quantized = [(n, m) for n, m in model.named_modules() if isinstance(m, QModuleMixin)]
    if not quantized:
        raise ValueError("nothing in the model is quantized; call qcompile.quantize(model, ...) first")
    work: dict[tuple[int, Plan], list[tuple[str, QModuleMixin, str]]] = {}
    for path, module in quantized:
        for name, plan in module.q.plans.items():
            if module._parameters.get(name) is not None:
                work.setdefault((id(module._parameters[name]), plan), []).append((path, module, name))
    meter = Meter()
    for (_, plan), users in track(list(work.items()), "freezing"):
        path, module, name = users[0]
        parameter = module._parameters[name]
        if parameter is None:
            continue
        try:
            value, change = plan.measured(parameter)
        except ValueError as error:
            raise ValueError(f"parameter {f'{path}.{name}' if path else name!r} cannot be quantized: {error}") from error
        held = QWeight(value, plan.arrangement, parameter.dtype)
        held.error = change
        meter.add(parameter.numel() * parameter.element_size())
        for _, module, name in users:
            del module._parameters[name]
            module._modules[CHILD + name] = held
        held.train(module.training)
        del parameter, value
    for _, module in quantized:
        settle_scales(module)
    waiting = sum(m.q.activations is not None and m.q.reads and not m.q.static_input for _, m in quantized)
    if waiting:
        log.warning(
            "%d modules were not calibrated: their inputs are quantized with one scale a token, taken as they come; "
            "for fixed scales run samples under qcompile.Calibration() before freezing", waiting,
        )  # fmt: skip
    return model
