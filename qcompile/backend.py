"""The Dynamo backend: ``torch.compile(model, backend="qcompile", options={...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from qcompile.capture_dynamo import from_dynamo, keep_inputs
from qcompile.compiling import cache, hand_on, label_of, quantized, release
from qcompile.garbage import collection_paused
from qcompile.guards import guard_held, guard_owned, guard_weights
from qcompile.inductor import cache_stamp, prepare
from qcompile.options import Options
from qcompile.owned import is_owned


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
    captured = quantized(lambda: from_dynamo(gm, example_inputs, cache), label_of(gm.graph), parsed)
    if not any(d.quantized for d in captured.program.decisions):
        for tensor in captured.weights.values():
            cache.pin(tensor)
        plain: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
        return plain
    done = hand_on(captured)
    keep_inputs(gm, done.kept)
    compiled: Any = compile_fx(done.module, [example_inputs[i] for i in done.kept], config_patches=patches)
    if not parsed.keep_float:
        release(captured, done)
    source = [n._dynamo_source for n in captured.sources]  # type: ignore[attr-defined]
    guard_weights(source[i] for i in done.dropped if i in captured.weights and i not in done.holding)
    guard_held(source[i] for i in done.holding if not is_owned(example_inputs[i]))
    guard_owned(source[i] for i, t in enumerate(example_inputs) if is_owned(t))
    # What Inductor returns keeps methods of the module, and with them its graph, which nobody reads any more.
    done.module.graph = fx.Graph()
    return compiled


def _mode_options(mode: str | None) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode is not None and mode not in known:
        raise ValueError(f"unknown mode {mode!r}; known modes: {', '.join(known)}")
    return {} if mode is None else dict(known[mode])
