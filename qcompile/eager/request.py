"""From the arguments of :func:`qcompile.quantize` to what is asked of a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qcompile.eager.optimizers import Optimizer, optimizer_named
from qcompile.eager.quantize import Request, activation_dtype
from qcompile.kernels.dtypes import QType
from qcompile.kernels.qparams import CLIPS
from qcompile.options import Options

#: Options that only a compiled program has.
_COMPILED = ("exact", "keep_float")


def request_of(
    weights: QType | str | None, activations: QType | str | None, optimizer: Any, options: Mapping[str, Any]
) -> Request:
    """Check and gather.

    Raises:
        ValueError: an unknown option, dtype or optimizer, or nothing to quantize; the message lists what is allowed.
        TypeError: a value of the wrong type.
    """
    for name in _COMPILED:
        if name in options:
            raise ValueError(f"{name} is an option of torch.compile(model, backend='qcompile'), not of a module")
    if optimizer is not None and optimizer not in CLIPS:
        optimizer = optimizer_named(optimizer)
    dtype = activation_dtype(activations)
    off = weights is None or weights == "none"
    if off and dtype is None:
        raise ValueError("nothing to quantize: give weights, activations or both")
    given = {k: v for k, v in options.items() if v is not None}
    if not off:
        given["weights"] = weights
    named = optimizer if isinstance(optimizer, str) else "max"
    select = Options.parse({"min_elements": 0, **given, "optimizer": named}).select
    if isinstance(optimizer, Optimizer):
        select = replace(select, small_mode=optimizer.preferred_mode(select.weights) or select.small_mode)
    return Request(select, dtype, named if optimizer is None else optimizer, not off)
