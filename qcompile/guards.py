"""When a compiled graph must be compiled anew because one of its weights is not what it was.

A quantized weight is no input of the compiled program any more: nothing but a guard sees that its parameter changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch._guards import Guard, Source, TracingContext

from qcompile.weight_cache import is_released, state_of

if TYPE_CHECKING:
    from torch._dynamo.guards import GuardBuilder


def guard_weight(source: Source) -> None:
    """Guard a weight that was quantized into the graph that Dynamo is compiling.

    Dynamo's own guard, on the strides that the weight had at capture, is taken away: a released weight has others. In its
    place the graph is compiled anew when the module holds another parameter, when the parameter is given other data
    (``p.data = …``), and, where its float values were not released, when they are written to in place.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    for guard in list(guards.inner):
        if guard.name == source.name and guard.create_fn_name() == "TENSOR_MATCH":
            guards.inner.discard(guard)
    guards.add(source.make_guard(_quantized_weight_match))


def _quantized_weight_match(builder: GuardBuilder, guard: Guard) -> None:
    """Add the checks; Dynamo calls this after the backend has returned, with the weight as it is now."""
    from torch._dynamo.guards import get_verbose_code_parts

    builder.ID_MATCH(guard)
    weight = builder.get(guard)
    manager = builder.get_guard_manager(guard)
    name = builder.arg_ref(guard)
    said = get_verbose_code_parts(f"{name} holds the values that were quantized", guard)
    if is_released(weight):
        # In C++, as a model has many: its strides are those of nothing but a released weight.
        manager.add_tensor_match_guard(
            weight,
            list(weight.shape),
            list(weight.stride()),
            name,
            said,
            guard.user_stack,
            type(weight),
            torch._C._dispatch_keys(weight),
        )
        return
    state = state_of(weight)
    manager.add_lambda_guard(lambda tensor: state_of(tensor) == state, said, guard.user_stack)
