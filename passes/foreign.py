"""Operators that other libraries define for what one of torch's own operators does, by name.

They count only where their library is imported; nothing is imported for their sake.
"""

from __future__ import annotations

import torch

#: ``(x, weight[E, K, N], ends)``: what ``aten._grouped_mm`` computes, for dtypes that it does not take.
GROUPED_MM = ("transformers::grouped_mm_fallback",)


def registered(names: tuple[str, ...]) -> list[torch._ops.OpOverload]:
    """Those of the operators that exist in this process."""
    found = []
    for name in names:
        namespace, _, operator = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found.append(packet.default)
    return found
