"""Which nodes go into sequences, and where in memory what they read lies."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch import fx

from qcompile.kernels.ops.sequence import MOST_AXES, Kind
from qcompile.passes.effects import written_by
from qcompile.passes.program import Program, value
from qcompile.passes.sequence_steps import (
    FEW,
    WRITES,
    Place,
    is_count,
    is_large,
    is_small,
    is_split,
    looked_at,
    seen,
)  # fmt: skip


def members_of(program: Program, shared: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """The steps: all large operators, and what is small between two of them."""
    candidates = {n for n in program.calls() if is_large(n) or is_small(n) or is_count(n)}
    places = places_of(program, candidates)
    # What a look cannot show is copied by a step, where it is little.
    copied = {n for n in program.calls() if looked_at(n) in places and n in places and places[n].root is n}
    candidates |= {n for n in copied if value(n).numel() <= FEW and value(n).dtype.is_floating_point}
    places = places_of(program, candidates)
    candidates -= {n for n in candidates if n.target in WRITES and not _alone(program, n, shared, places)}
    return feeding(program, candidates, places_of(program, candidates))


def _alone(program: Program, write: fx.Node, shared: dict[fx.Node, fx.Node], places: dict[fx.Node, Place]) -> bool:
    """Whether all that shares memory with what is written to is known to be a view of it."""
    root = shared[write]
    return all(n in places and places[n].root is root for n in program.graph.nodes if shared[n] is root)


def feeding(program: Program, candidates: set[fx.Node], places: dict[fx.Node, Place]) -> set[fx.Node]:
    """Those of the candidates that are large, or lie between large ones, or write down what comes from large ones."""

    def between(order: list[fx.Node], ends: set[fx.Node], next_to: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in order:
            passes = node in candidates or passes_on(node, places)
            if node in ends or (passes and any(n in found for n in next_to(node))):
                found.add(node)
        return found

    order = list(program.graph.nodes)
    large = set(filter(is_large, candidates))
    counts = set(filter(is_count, candidates))
    writes = {n for n in candidates - counts if n.target in WRITES}
    found = (
        candidates
        & between(order, large, lambda n: n.all_input_nodes)
        & between(order[::-1], large | writes, lambda n: n.users)
    )
    for node in reversed(order):  # where a cache is written to: counted where nobody else asks
        if node in counts and node.users and found.issuperset(node.users):
            found.add(node)
    touching = _touching(order, places)
    for node in order:
        if node in counts and node.target in WRITES:
            others = touching[places[node.args[0]].root] - {node}
            if found.issuperset(others):
                found.add(node)
    return found


def _touching(order: list[fx.Node], places: dict[fx.Node, Place]) -> dict[fx.Node, set[fx.Node]]:
    """What reads or writes the memory of each root."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in order:
        if not passes_on(node, places):
            for n in node.all_input_nodes:
                if n in places:
                    found.setdefault(places[n].root, set()).add(node)
    return found


def read_outside(
    program: Program, members: set[fx.Node], places: dict[fx.Node, Place], shared: dict[fx.Node, fx.Node]
) -> set[fx.Node]:
    """What is written to, and read or written to by more than the members: its memory must be known to all."""
    written = {shared[n] for call in program.calls() for n in written_by(call)}
    others = (n for n in program.graph.nodes if n not in members and not passes_on(n, places))
    return {shared[n] for node in others for n in node.all_input_nodes} & written


def places_of(program: Program, members: set[fx.Node]) -> dict[fx.Node, Place]:
    """Where each tensor lies; a look that cannot show memory as it is copies it, and lies for itself."""
    places: dict[fx.Node, Place] = {}
    for node in program.graph.nodes:
        own = value(node)
        if not isinstance(own, torch.Tensor) or not all(isinstance(n, int) for n in (*own.shape, *own.stride())):
            continue
        source = looked_at(node)
        place = seen(node, places[source]) if source in places and node not in members else None
        if node.target in WRITES and node in members:
            places[node] = places[node.args[0]]
        elif place is not None:
            places[node] = place
        elif own.dim() <= MOST_AXES and own.layout == torch.strided:
            places[node] = Place(node, 0, Kind.of(own))
    return places


def passes_on(node: fx.Node, places: dict[fx.Node, Place]) -> bool:
    """Whether a node does nothing but name a part of a result, or memory that is known, in another way."""
    if node.target is operator.getitem or is_split(node):
        return True
    return looked_at(node) is not None and node in places and places[node].root is not node
