"""The one ``torch.library`` object that owns the namespace ``qcompile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

lib = torch.library.Library("qcompile", "FRAGMENT")


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    any_strides: bool = False,
) -> None:
    """Define an operator: schema, plain-torch reference for every device, fake implementation, autograd formula.

    The reference is the oracle in tests and the fallback on a device that has no kernel; kernels override it by
    registering an implementation for their own device.

    Args:
        any_strides: kernels read inputs of any strides, and the strides of results do not depend on them; Inductor then
            hands over what it has, instead of a copy for each call.
    """
    name = schema.partition("(")[0]
    layout = (torch.Tag.flexible_layout,) if any_strides else ()
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, *layout))
    lib.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qcompile::{name}", fake, lib=lib)
    if backward is not None:
        torch.library.register_autograd(f"qcompile::{name}", backward, setup_context=setup_context, lib=lib)


def no_gradient(op: str, reason: str) -> Callable[..., Any]:
    """An autograd formula that raises.

    An operator with no formula at all is worse: autograd then goes through the reference's own arithmetic, rounding
    included, and gives numbers that are no gradient.
    """

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"qcompile::{op} has no gradient: {reason}")

    return backward
