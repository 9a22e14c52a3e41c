"""What the tests of quantized modules are held against: the float module with the codes' values, in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import qcompile

#: The CPU kernel rounds its input to int8 by blocks of 32: what that may cost a product of normal numbers.
KERNEL = 0.015


def rounded(original: nn.Module, quantized: nn.Module) -> nn.Module:
    """A float64 copy of ``original`` that has the values of the codes of ``quantized``, frozen or not."""
    reference = copy.deepcopy(original)
    for path, module in quantized.named_modules():
        if not isinstance(module, qcompile.QModuleMixin):
            continue
        for name, plan in module.q.plans.items():
            held = module._modules.get(f"q_{name}")
            value = plan.quantize(module._parameters[name]) if held is None else held.logical()
            parameter = reference.get_submodule(path)._parameters[name]
            with torch.no_grad():
                parameter.copy_(plan.arrangement.parameter(value.dequantize()))
    return reference.double()


def doubled(x: Any) -> Any:
    """Float tensors in any structure as float64."""
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, x)


def error(y: Any, expected: Any) -> float:
    """The relative error (2-norm) of all float tensors in two structures together; shapes must agree."""
    pairs = list(zip(tree_leaves(y), tree_leaves(expected), strict=True))
    pairs = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
    for a, b in pairs:
        if a.shape != b.shape:
            raise AssertionError(f"shapes differ: {list(a.shape)}, expected {list(b.shape)}")
    if not pairs or not sum(b.numel() for _, b in pairs):
        return 0.0
    actual, wanted = (torch.cat([p[i].detach().double().reshape(-1) for p in pairs]) for i in (0, 1))
    return float((actual - wanted).norm() / wanted.norm())
