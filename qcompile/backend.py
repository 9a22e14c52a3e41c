"""The Dynamo backend: ``torch.compile(model, backend="qcompile", options={...})``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from qcompile.capture_dynamo import Captured, from_dynamo, keep_inputs, to_inductor
from qcompile.dump import observer
from qcompile.garbage import collection_paused
from qcompile.guards import guard_held, guard_owned, guard_weights
from qcompile.history import graphs, record
from qcompile.inductor import cache_stamp, prepare
from qcompile.options import Options
from qcompile.owned import is_owned
from qcompile.passes.pipeline import run
from qcompile.passes.program import FreedError, Program
from qcompile.passes.restore import restore
from qcompile.passes.select import first_match, unmatched
from qcompile.weight_cache import WeightCache, ids_in, is_released

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

    The float values of a quantized parameter are released as soon as its first graph is compiled, unless a graph that was
    compiled earlier reads them, something else shares their storage, or ``keep_float`` is set. From then on the compiled
    model is the only way to run it: whatever still reads the parameter itself (the module called without compiling it, eager
    code between two graphs, a checkpoint) gets NaN, and writing to it raises. A later graph that needs the values in another
    form is refused with an error. Once Dynamo reaches its recompile limit it runs the model eagerly, which gives NaN; with
    ``fullgraph=True`` it raises instead.

    A graph is compiled anew when a module holds another parameter than before, or the parameter other data
    (``p.data = …``), or when values that were kept are changed in place.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, parameters among them.
        mode: one of Inductor's modes, as in ``torch.compile(mode=...)``.
        options: see :class:`qcompile.options.Options`.

    Raises:
        ValueError: an unknown option, a value that is not allowed, or a weight that cannot be quantized.
    """
    parsed = Options.parse(options)
    patches = {**_mode_options(mode), **cache_stamp()}
    with collection_paused():
        return _compiled(gm, example_inputs, parsed, patches)


def _compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], parsed: Options, patches: dict[str, Any]
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    prepare()
    captured, results = _quantized(gm, example_inputs, parsed)
    program = captured.program
    held = list(captured.weights.values())
    _warn_if_training(program, held)
    record(_label(gm), program.decisions, results, held)
    if not any(d.quantized for d in program.decisions):
        for tensor in held:
            cache.pin(tensor)
        plain: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
        return plain
    cache.hold(t for c in program.constants.values() if c.index is None for t in (c.tensor, *c.parts))
    module, kept = to_inductor(captured)
    dropped = sorted(set(range(len(captured.sources))) - set(kept))
    sources = {i: _source_of(captured.sources[i]) for i in dropped}
    holding = {i for c in program.constants.values() for i in c.holds} - set(kept)
    for i in (holding | set(kept)) & captured.weights.keys():
        cache.pin(example_inputs[i])
    keep_inputs(gm, kept)
    compiled: Any = compile_fx(module, [example_inputs[i] for i in kept], config_patches=patches)
    quantized = set() if parsed.keep_float else cache.quantized()
    for i in set(dropped) & captured.weights.keys():
        given = example_inputs[i]
        # Biases that were stacked are too small to be worth it.
        if not quantized.isdisjoint(cache.identity(given)) and not cache.release(given):
            log.info("%s keeps its float values: something else shares or reads them", sources[i].name)
    guard_weights(sources[i] for i in dropped if i in captured.weights and i not in holding)
    guard_held(sources[i] for i in holding if not is_owned(example_inputs[i]))
    guard_owned(_source_of(captured.sources[i]) for i, t in enumerate(example_inputs) if is_owned(t))
    # What Inductor returns keeps methods of the module, and with them its graph, which nobody reads any more.
    module.graph = fx.Graph()
    return compiled


def _source_of(node: fx.Node) -> Any:
    """Where Dynamo found an input."""
    return node._dynamo_source  # type: ignore[attr-defined]


def _quantized(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> tuple[Captured, list[Any]]:
    """Capture and run all passes; once more where what an earlier graph left of a weight is not what this one needs."""
    captured = from_dynamo(gm, example_inputs, cache)
    with contextlib.suppress(FreedError):
        return captured, _run(captured.program, options)
    # Nothing but this variable keeps the values alive until the second run is over.
    values = _brought_back(captured)
    captured = from_dynamo(gm, example_inputs, cache)
    try:
        return captured, _run(captured.program, options)
    except FreedError as error:
        raise ValueError(f"{error}; compile with options={{'keep_float': True}}") from error
    finally:
        values.clear()


def _brought_back(captured: Captured) -> dict[tuple[object, ...], Any]:
    """The codes of the captured weights, out of what they were packed into; where that fails but the floats are there,
    the weight is forgotten, and so quantized again."""
    held = {i: cache.identity(w) for i, w in captured.weights.items()}
    ids = ids_in(tuple(held.values()))
    values = restore(cache, lambda key: not ids.isdisjoint(ids_in(key)))
    freed = {k for k in cache if k[0] == "weight" and cache[k][0].data.is_meta}
    for key in [k for k in cache if k[0] == "unpacked" and not ids.isdisjoint(ids_in(k))]:
        # What these were unpacked from is there as long as its module is; they are unpacked again.
        del cache[key]
    there = ids_in(tuple(held[i] for i, w in captured.weights.items() if not is_released(w)))
    cache.discard(there & ids_in(tuple(freed)))
    return values


def _run(program: Program, options: Options) -> list[Any]:
    find, others = options.finding()
    watcher = observer("compile", options)
    results = run(find, program, watcher)
    known = [name for d in program.decisions for name in (d.weight, d.module) if name]
    unused = unmatched((*options.include, *options.exclude), program)
    unused = [p for p in unused if first_match([p], known) is None]
    results += run([*others, *options.lowering()], program, watcher)
    lost = [c for c in program.constants.values() if c.tensor.is_meta]
    if any(c.index is not None for c in lost):
        raise ValueError(
            f"the float values of {lost[0].name!r} were released after an earlier graph was compiled, but this graph needs "
            f"them in another form; compile with options={{'keep_float': True}}"
        )
    if lost:
        raise FreedError(f"the program reads {lost[0].name!r}, which was freed")
    _warn_of_unmatched(program, unused)
    return results


def _mode_options(mode: str | None) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode is not None and mode not in known:
        raise ValueError(f"unknown mode {mode!r}; known modes: {', '.join(known)}")
    return {} if mode is None else dict(known[mode])


def _label(gm: fx.GraphModule) -> str:
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            return str(next(iter(stack.values()))[1]).rpartition(".")[2].rstrip("'>")
    return "function"


def _warn_if_training(program: Program, held: Sequence[Tensor]) -> None:
    """Say once a model why nothing was quantized."""
    left = [d for d in program.decisions if d.reason and "receives gradients" in d.reason]
    if not left or any(d.quantized for d in program.decisions):
        return
    ids = {id(t) for t in held}
    if any(g.reads(ids) and not any(d.quantized for d in g.decisions) for g in graphs()):
        return
    log.warning(
        "no weight was quantized: all %d receive gradients; call the compiled model under torch.no_grad() or "
        "torch.inference_mode(), or set requires_grad_(False) on its parameters",
        len(left),
    )


def _warn_of_unmatched(program: Program, patterns: Sequence[str]) -> None:
    """Patterns are a model's, and this may be one of its graphs only: one that matches nothing here is no error."""
    names = sorted({d.weight for d in program.decisions if d.weight})
    if patterns and names:
        shown = ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")
        log.warning("no weight of this graph matches %s; its weights are: %s", ", ".join(map(repr, patterns)), shown)
