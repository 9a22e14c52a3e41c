"""What ``torch.compile`` has made so far, for the report: one entry a graph, held as long as its parameters live."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompile.passes.decision import Decision
from qcompile.passes.pipeline import Result


@dataclass
class Graph:
    """One compiled graph.

    Attributes:
        label: the name of the outermost module that it came from.
        decisions: its report rows.
        results: what each pass did.
        weights: the parameters and buffers that it reads.
    """

    label: str
    decisions: list[Decision]
    results: list[Result]
    weights: list[weakref.ref[Tensor]] = field(default_factory=list)

    def reads(self, tensors: set[int]) -> bool:
        """Whether it reads one of the tensors with these ids."""
        return any(id(w()) in tensors for w in self.weights if w() is not None)

    @property
    def alive(self) -> bool:
        """Whether any of its weights still lives (a graph without weights always does)."""
        return not self.weights or any(w() is not None for w in self.weights)


_graphs: list[Graph] = []
_lock = threading.Lock()


def record(label: str, decisions: Sequence[Decision], results: Sequence[Result], weights: Iterable[Tensor]) -> Graph:
    """Add a graph, and drop those whose weights are gone."""
    graph = Graph(label, list(decisions), list(results), [weakref.ref(w) for w in weights])
    with _lock:
        _graphs[:] = [g for g in _graphs if g.alive]
        _graphs.append(graph)
    return graph


def graphs(module: torch.nn.Module | None = None) -> list[Graph]:
    """The graphs that read weights of ``module``; all of them without one."""
    with _lock:
        if module is None:
            return [g for g in _graphs if g.alive]
        held = {id(t) for t in (*module.parameters(), *module.buffers())}
        return [g for g in _graphs if g.reads(held)]
