"""The Dynamo backend: ``torch.compile(model, backend="qcompile", options={...})``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import Source, TracingContext

from qcompile.capture_dynamo import Captured, from_dynamo, keep_inputs, to_inductor
from qcompile.dump import observer
from qcompile.history import record
from qcompile.inductor import cache_stamp, prepare
from qcompile.options import Options
from qcompile.passes.pipeline import run
from qcompile.passes.program import Program
from qcompile.weight_cache import WeightCache, numbers_in

log = logging.getLogger("qcompile.backend")

#: Shared by all graphs of the process, so that each weight is quantized and held once.
cache = WeightCache()


def qcompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Quantize the weights of a captured graph, and compile it with Inductor.

    Dynamo calls this once for each graph; users write ``torch.compile(model, backend="qcompile")``.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, parameters among them.
        mode: one of Inductor's modes, as in ``torch.compile(mode=...)``.
        options: see :class:`qcompile.options.Options`.

    Raises:
        ValueError: an unknown option, a value that is not allowed, or a weight that cannot be quantized.
    """
    from torch._inductor.compile_fx import compile_fx

    parsed = Options.parse(options)
    patches = {**_mode_options(mode), **cache_stamp()}
    prepare()
    captured, results = _quantized(gm, example_inputs, parsed)
    program = captured.program
    held = [example_inputs[i] for i in captured.held]
    record(_label(gm), program.decisions, results, held)
    _warn_if_training(program)
    if not any(d.quantized for d in program.decisions):
        return compile_fx(gm, list(example_inputs), config_patches=patches)
    cache.trim({id(c.tensor) for c in program.constants.values()})
    module, kept = to_inductor(captured)
    dropped = [i for i in range(len(captured.sources)) if i not in set(kept)]
    sources = [captured.sources[i]._dynamo_source for i in dropped]
    keep_inputs(gm, kept)
    compiled = compile_fx(module, [example_inputs[i] for i in kept], config_patches=patches)
    for i, source in zip(dropped, sources, strict=True):
        _guard_identity(source)
        given = example_inputs[i]
        if not parsed.keep_float and isinstance(given, torch.nn.Parameter):
            cache.release(given)
    return compiled


def _quantized(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> tuple[Captured, list[Any]]:
    """Capture and run all passes; once more where what an earlier graph left of a weight is not what this one needs."""
    for attempt in range(2):
        captured = from_dynamo(gm, example_inputs, cache)
        program = captured.program
        results = run([*options.quantization(), *options.lowering()], program, observer("compile", options))
        lost = [c for c in program.constants.values() if c.tensor.is_meta]
        if not lost:
            return captured, results
        cache.discard(set().union(*(numbers_in(c.identity) for c in lost)))
        if attempt or any(c.index is not None for c in lost):
            break
    raise ValueError(
        f"the float values of {lost[0].name!r} were released after an earlier graph was compiled, but this graph needs "
        f"them in another form; compile with options={{'keep_float': True}}"
    )


def _mode_options(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def _guard_identity(source: Source) -> None:
    """Guard a quantized parameter by its identity: a new one recompiles, the released one's odd strides do not."""
    from torch._dynamo.guards import GuardBuilder

    context = TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    for guard in list(guards.inner):
        if guard.name == source.name and guard.create_fn_name() == "TENSOR_MATCH":
            guards.inner.discard(guard)
    guards.add(source.make_guard(GuardBuilder.ID_MATCH))


def _label(gm: fx.GraphModule) -> str:
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            return str(next(iter(stack.values()))[1]).rpartition(".")[2].rstrip("'>")
    return "function"


def _warn_if_training(program: Program) -> None:
    left = [d for d in program.decisions if d.reason and "receives gradients" in d.reason]
    if left and not any(d.quantized for d in program.decisions):
        log.warning(
            "no weight was quantized: all %d receive gradients; call the compiled model under torch.no_grad() or "
            "torch.inference_mode(), or set requires_grad_(False) on its parameters",
            len(left),
        )
