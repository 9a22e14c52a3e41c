"""When a compiled graph must be compiled anew because one of its weights is not what it was.

A quantized weight is no input of the compiled program any more: nothing but a guard sees that its parameter changed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._guards import Guard, GuardsSet, Source, TracingContext

from qcompile.weight_cache import is_released, state_of

if TYPE_CHECKING:
    from torch._dynamo.guards import GuardBuilder


def guard_weights(sources: Iterable[Source]) -> None:
    """Guard the constants that went into the graph which Dynamo is compiling: quantized weights, folded statistics.

    Dynamo's own guard, on the strides that a weight had at capture, is taken away: a released weight has others. In its
    place the graph is compiled anew when the module holds another parameter, when the parameter is given other data
    (``p.data = …``), and, where its float values were not released, when they are written to in place. That last check
    runs in Python: one for all of them, as a model may have hundreds.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    watch, sources = _Watch(), list(sources)
    _discard_matches(guards, sources)
    for source in sources:
        guards.add(source.make_guard(functools.partial(_quantized_weight_match, watch)))


def guard_held(sources: Iterable[Source]) -> None:
    """Guard that what the compiled program holds is what it would be given: the same tensors."""
    from torch._dynamo.guards import GuardBuilder

    context = TracingContext.try_get()
    if context is not None:
        for source in sources:
            context.guards_context.dynamo_guards.add(source.make_guard(GuardBuilder.ID_MATCH))


def guard_owned(sources: Iterable[Source]) -> None:
    """Guard that tensors with an owner are the same ones; that they stay what they are is promised (:mod:`qcompile.owned`).

    Dynamo's own guards on them are looked at even in a loop that looks at no others: ninety in a step over one token.
    """
    sources, context = list(sources), TracingContext.try_get()
    if context is not None:
        _discard_matches(context.guards_context.dynamo_guards, sources)
        guard_held(sources)


def _discard_matches(guards: GuardsSet, sources: Iterable[Source]) -> None:
    names = {source.name for source in sources}
    for guard in [g for g in guards.inner if g.name in names and g.create_fn_name() == "TENSOR_MATCH"]:
        guards.inner.discard(guard)


@dataclass
class _Watch:
    """Constants whose values were kept, with the state that they had."""

    seen: list[tuple[weakref.ref[Tensor], tuple[int, int]]] = field(default_factory=list)

    def unchanged(self, _: object) -> bool:
        for reference, state in self.seen:
            tensor = reference()
            if tensor is None or state_of(tensor) != state:
                return False
        return True


def _quantized_weight_match(watch: _Watch, builder: GuardBuilder, guard: Guard) -> None:
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
    watch.seen.append((weakref.ref(weight), state_of(weight)))
    if len(watch.seen) == 1:
        manager.add_lambda_guard(watch.unchanged, said, guard.user_stack)
