"""What must stay in order: who shares memory with whom, who writes, and what each node therefore waits for."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from qcompile.passes.program import Program
from qcompile.passes.writes import aliased


def understood(program: Program) -> bool:
    """Whether each call of a program is an operator with a schema, or Python's arithmetic on sizes."""
    return all(
        hasattr(n.target, "_schema") or getattr(n.target, "__module__", "") in ("_operator", "math", "torch")
        for n in program.calls()
    )


def roots(program: Program) -> dict[fx.Node, fx.Node]:
    """Of each node the one whose memory it may share: of a view what it shows, of a write in place what it writes to."""
    found: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        shown = next(_shared(node), None)
        found[node] = node if shown is None else found[shown]
    return found


def _shared(node: fx.Node) -> Iterator[fx.Node]:
    if node.target is operator.getitem:
        yield node.args[0]  # type: ignore[misc]
    yield from (given for given, _ in aliased(node) if isinstance(given, fx.Node))


def written_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory an operator writes to."""
    found: list[fx.Node] = []
    for given, written in aliased(node):
        if written:
            found += [n for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, fx.Node)]
    return found


def waits(program: Program, shared: dict[fx.Node, fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Of each node those that must run before it: what it reads; who wrote to what it reads; for a write, who read before.

    Operators that draw random numbers stay in order among themselves.
    """
    written = {shared[node] for call in program.calls() for node in written_by(call)}
    last: dict[object, fx.Node] = {}
    since: dict[object, list[fx.Node]] = {}
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in program.graph.nodes:
        touched: set[object] = {shared[n] for n in node.all_input_nodes if shared[n] in written}
        writes: set[object] = {shared[n] for n in written_by(node)}
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            writes.add("random")
        before = set(node.all_input_nodes)
        for place in touched | writes:
            if place in last:
                before.add(last[place])
            if place in writes:
                before.update(since.pop(place, ()))
                last[place] = node
            since.setdefault(place, []).append(node)
        found[node] = before - {node}
    return found
