"""From a toy module to its quantized program, in one call: what each test of a pass starts with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from qcompile import history, trace
from qcompile.capture_export import from_exported
from qcompile.export import compile_exported, lowered, quantize_exported
from qcompile.options import Options
from qcompile.passes.decision import Decision
from qcompile.passes.gather_sequences import GatherSequences
from qcompile.passes.pipeline import lowering
from qcompile.passes.program import Program
from qcompile.report import rows_of


@dataclass
class Outcome:
    """A float module, its quantized program, and what both make of the same inputs.

    Attributes:
        model: the float module.
        inputs: what both were called with.
        ep: the float program.
        qep: the quantized one.
        rows: the report.
        want: the float module's results.
        got: the quantized program's results, run eagerly.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    ep: ExportedProgram
    qep: ExportedProgram
    rows: list[Decision]
    want: list[Tensor]
    got: list[Tensor]

    @property
    def quantized(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Kind, weight and shape of each quantized row."""
        return [(r.op, r.weight, r.shape) for r in self.rows if r.quantized]

    @property
    def alone(self) -> list[tuple[str, str, str]]:
        """Kind, weight and reason of each row that is left alone."""
        return [(r.op, r.weight, r.reason or "") for r in self.rows if not r.quantized]

    @property
    def ops(self) -> Counter[str]:
        """How often each operator stands in the quantized graph, subgraphs included."""
        return operators(self.qep.graph_module)

    @property
    def worst_weight(self) -> float:
        """The largest relative error of a weight."""
        return max((r.error or 0.0 for r in self.rows), default=0.0)

    def lowered(self, exact: bool = True) -> list[Tensor]:
        """Results of the program with packed weights; ``exact``: kernels keep float activations."""
        with verified(), torch.no_grad():
            return tensors(lowered(self.qep, Options.parse({"exact": exact})).module()(*self.inputs))

    def compiled(self, exact: bool = True) -> list[Tensor]:
        """Results of the program that Inductor compiles."""
        with verified(), torch.no_grad():
            return tensors(compile_exported(self.qep, exact=exact)(*self.inputs))


@contextmanager
def verified() -> Iterator[None]:
    """A context in which every pass is verified after it ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILE_VERIFY", "1")
        yield


@contextmanager
def ungathered() -> Iterator[None]:
    """A context in which lowered programs keep a call for each operator, for tests that count them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompile.options.lowering", lambda: [p for p in lowering() if not isinstance(p, GatherSequences)])
        yield


def export(model: nn.Module, *inputs: Any, strict: bool = False, dynamic_shapes: Any = None) -> ExportedProgram:
    """``model`` as an exported program, without gradients."""
    with torch.no_grad():
        return torch.export.export(model, inputs, strict=strict, dynamic_shapes=dynamic_shapes)


def quantize(
    model: nn.Module, *inputs: Any, strict: bool = False, dynamic_shapes: Any = None,
    before: Callable[[ExportedProgram], ExportedProgram] = lambda ep: ep, **options: Any,
) -> Outcome:  # fmt: skip
    """Export, quantize (every weight, however small) and run ``model``.

    Args:
        before: changes the exported program before it is quantized.
        options: of :class:`qcompile.options.Options`.
    """
    ep = before(export(model, *inputs, strict=strict, dynamic_shapes=dynamic_shapes))
    with verified(), torch.no_grad():
        qep = quantize_exported(ep, Options.parse({"min_elements": 0, **options}))
        want, got = tensors(model(*inputs)), tensors(qep.module()(*inputs))
    return Outcome(model, inputs, ep, qep, list(rows_of(qep.graph)), want, got)


def quantize_program(ep: ExportedProgram, **options: Any) -> tuple[ExportedProgram, list[Decision]]:
    """An exported program, quantized (every weight, however small), and its report."""
    with verified():
        qep = quantize_exported(ep, Options.parse({"min_elements": 0, **options}))
    return qep, list(rows_of(qep.graph))


@contextmanager
def without_inductor() -> Iterator[None]:
    """Within it, what Inductor is handed is run as it is, without waiting for a C++ compiler."""
    with pytest.MonkeyPatch.context() as patch:
        # A copy: the backend lets go of the graph that it handed over.
        keep = "torch._inductor.compile_fx.compile_fx"
        patch.setattr(keep, lambda module, inputs, config_patches: fx.GraphModule(module, module.graph))
        yield


def compile_without_inductor(model: nn.Module, *inputs: Any, **options: Any) -> tuple[Any, list[Decision]]:
    """What ``torch.compile(model, backend="qcompile")`` makes of ``inputs``, and its report."""
    with verified(), without_inductor(), torch.no_grad():
        compiled = torch.compile(model, backend="qcompile", options={"min_elements": 0, **options})
        results = compiled(*inputs)
    return results, [d for graph in history.graphs(model) for d in graph.decisions]


def trace_without_inductor(model: nn.Module, *inputs: Any, **options: Any) -> tuple[Any, list[Decision]]:
    """What ``qcompile.trace(model)`` makes of ``inputs``, called twice, and its report."""
    with verified(), without_inductor(), torch.no_grad():
        traced = trace(model, min_elements=0, **options)
        traced(*inputs)
        results = traced(*inputs)
    return results, [d for graph in history.graphs(model) for d in graph.decisions]


def program_of(model: nn.Module, *inputs: Any, **options: Any) -> Program:
    """The program that passes start from."""
    return from_exported(export(model, *inputs, **options))


def operators(module: fx.GraphModule) -> Counter[str]:
    """How often each operator stands in a graph and its subgraphs, as ``namespace.name``."""
    counts: Counter[str] = Counter()
    for graph in graphs(module):
        for node in graph.nodes:
            if node.op == "call_function":
                counts[str(node.target).removesuffix(".default")] += 1
    return counts


def graphs(module: fx.GraphModule) -> Iterator[fx.Graph]:
    """The graph of a module and those of its submodules."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield part.graph


def tensors(results: Any) -> list[Tensor]:
    """All tensors of a (nested) result, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error of a result, as ``|got - want| / |want|`` in the Frobenius norm, in float64."""
    if len(got) != len(want):
        raise AssertionError(f"{len(got)} results, wanted {len(want)}")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(f"got {a.dtype} {list(a.shape)}, wanted {b.dtype} {list(b.shape)}")
        if b.numel():
            a, b = a.detach().double(), b.detach().double()
            worst = max(worst, float((a - b).norm() / b.norm().clamp_min(1e-30)))
    return worst
