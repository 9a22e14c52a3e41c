"""From what was captured to a compiled program: the passes, Inductor, and the weights that nobody needs any more."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qcompile.captured import Captured, to_inductor
from qcompile.dump import observer
from qcompile.history import graphs, record
from qcompile.options import Options
from qcompile.passes.pipeline import run
from qcompile.passes.program import FreedError, Program
from qcompile.passes.restore import restore
from qcompile.passes.select import first_match, unmatched
from qcompile.weight_cache import WeightCache, ids_in, is_released

log = logging.getLogger("qcompile.compiling")

#: Shared by all graphs of the process, so that each weight is quantized and held once.
cache = WeightCache()


def quantized(capture: Callable[[], Captured], label: str, options: Options) -> Captured:
    """Capture, and run all passes; once more where what an earlier graph left of a weight is not what this one needs.

    Args:
        capture: makes the program, each time it is called.
        label: what the report calls the graph.

    Raises:
        ValueError: a weight that cannot be quantized, or whose values are gone.
    """
    captured, results = _quantized(capture, options)
    held = list(captured.weights.values())
    _warn_if_training(captured.program, held)
    record(label, captured.program.decisions, results, held)
    return captured


@dataclass(frozen=True)
class HandedOn:
    """A program for Inductor.

    Attributes:
        module: what it compiles.
        kept: positions of the inputs that it is given, in order.
        dropped: positions of those that it is not given: what was made of them is in the program.
        holding: positions of those among them that the program holds as they are.
    """

    module: fx.GraphModule
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    holding: frozenset[int]


def hand_on(captured: Captured) -> HandedOn:
    """Take a program apart for Inductor; the weights that it reads keep their values from now on."""
    program = captured.program
    cache.hold(t for c in program.constants.values() if c.index is None for t in (c.tensor, *c.parts))
    module, kept = to_inductor(captured)
    dropped = sorted(set(range(len(captured.given))) - set(kept))
    holding = {i for c in program.constants.values() for i in c.holds} - set(kept)
    for i in (holding | set(kept)) & captured.weights.keys():
        cache.pin(captured.given[i])
    return HandedOn(module, tuple(kept), tuple(dropped), frozenset(holding))


def release(captured: Captured, done: HandedOn) -> None:
    """Free the float values of the weights that were quantized, now that the program is compiled."""
    made = cache.quantized()
    for i in set(done.dropped) & captured.weights.keys():
        given = captured.given[i]
        # Biases that were stacked are too small to be worth it.
        if not made.isdisjoint(cache.identity(given)) and not cache.release(given):
            log.info("%s keeps its float values: something else shares or reads them", captured.names[i])


def label_of(graph: fx.Graph) -> str:
    """The name of the outermost module that a graph came from."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            return str(next(iter(stack.values()))[1]).rpartition(".")[2].rstrip("'>")
    return "function"


def _quantized(capture: Callable[[], Captured], options: Options) -> tuple[Captured, list[Any]]:
    captured = capture()
    with contextlib.suppress(FreedError):
        return captured, _run(captured.program, options)
    # Nothing but this variable keeps the values alive until the second run is over.
    values = _brought_back(captured)
    captured = capture()
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
