"""Runs of the CPU's operators become one call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qcompile.kernels.ops.sequence import MOST_AXES, Kind, Writer
from qcompile.passes.base import Pass
from qcompile.passes.constant_store import Stored, store_constants
from qcompile.passes.effects import roots, understood, waits
from qcompile.passes.program import Program, getitem, value
from qcompile.passes.sequence_steps import (
    FEW,
    WRITES,
    Place,
    is_large,
    is_small,
    is_split,
    looked_at,
    parts_of,
    seen,
    written,
)  # fmt: skip

qc = torch.ops.qcompile


@dataclass(frozen=True)
class GatherSequences(Pass):
    """Give the CPU's operators, and the views and the little arithmetic between them, to one operator::

        chain ─► views ─► rotation ─► write to a cache ─► attention ─► chain     ->     sequence_writing(caches, …, program)
        conv_tiled ─► conv_depthwise ─► conv_tiled ─► …                          ->     sequence(…, program)

    Calls from Python, allocations and fresh pages are paid once instead of once an operator, which is most of what small
    models cost beside their products. What a sequence does not take (anything else, sizes that are not known, large element
    by element work, which Inductor is better at) stays outside: a value that comes back from there ends a sequence, and the
    next one begins. Writes in place keep their order with all that reads the same memory. Only for inference.

    Before: packed; strides are those that the program computes. After: the same results.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many operators went into sequences."""
        if not program.inference or not understood(program) or not any(map(is_large, program.calls())):
            return 0
        _merge_parts(program)
        shared = roots(program)
        before = waits(program, shared)
        members = _members(program, shared)
        while True:
            places = _places(program, members)
            made, position = _positions(program, members, places, before)
            groups: dict[int, list[fx.Node]] = {}
            for node in program.graph.nodes:
                if node in members:
                    groups.setdefault(made[node], []).append(node)
            poor = {n for group in groups.values() if sum(map(is_large, group)) < 2 for n in group}
            if not poor:
                break
            members -= poor
            members = _feeding(program, members, places)
        if not groups:
            return 0
        _sort(program, position)
        # In the program's order, which is another process's, too: else no cache would find it compiled.
        steps = (n for n in program.graph.nodes if n in members)
        read = dict.fromkeys(places[n].root for m in steps for n in m.all_input_nodes)
        stored = store_constants(program, read)
        moved: dict[fx.Node, fx.Node] = {}
        for _, group in sorted(groups.items()):
            _Group(program, group, members, places, stored, moved).build()
        _erase(program, [n for n in program.calls() if n in members or _passes_on(n, places)])
        program.drop_unread(stored)
        return len(members)


def _merge_parts(program: Program) -> None:
    """One node for each part of a result."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in program.calls(operator.getitem):
        kept = first.setdefault(node.args, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            program.graph.erase_node(node)


def _members(program: Program, shared: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """The steps: all large operators, and what is small between two of them."""
    candidates = {n for n in program.calls() if is_large(n) or is_small(n)}
    places = _places(program, candidates)
    # What a look cannot show is copied by a step, where it is little.
    copied = {n for n in program.calls() if looked_at(n) in places and n in places and places[n].root is n}
    candidates |= {n for n in copied if value(n).numel() <= FEW and value(n).dtype.is_floating_point}
    places = _places(program, candidates)
    candidates -= {n for n in candidates if n.target in WRITES and not _alone(program, n, shared, places)}
    return _feeding(program, candidates, _places(program, candidates))


def _alone(program: Program, write: fx.Node, shared: dict[fx.Node, fx.Node], places: dict[fx.Node, Place]) -> bool:
    """Whether all that shares memory with what is written to is known to be a view of it."""
    root = shared[write]
    return all(n in places and places[n].root is root for n in program.graph.nodes if shared[n] is root)


def _feeding(program: Program, candidates: set[fx.Node], places: dict[fx.Node, Place]) -> set[fx.Node]:
    """Those of the candidates that are large, or lie between large ones, or write down what comes from large ones."""

    def between(order: list[fx.Node], ends: set[fx.Node], next_to: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in order:
            passes = node in candidates or _passes_on(node, places)
            if node in ends or (passes and any(n in found for n in next_to(node))):
                found.add(node)
        return found

    order = list(program.graph.nodes)
    large = set(filter(is_large, candidates))
    writes = {n for n in candidates if n.target in WRITES}
    return (
        candidates
        & between(order, large, lambda n: n.all_input_nodes)
        & between(order[::-1], large | writes, lambda n: n.users)
    )


def _places(program: Program, members: set[fx.Node]) -> dict[fx.Node, Place]:
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


def _positions(
    program: Program, members: set[fx.Node], places: dict[fx.Node, Place], before: dict[fx.Node, set[fx.Node]]
) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """When each value is there, and where its node goes: odd times are sequences, even ones what lies between them.

    A member takes part in the first sequence that runs when all that it waits for is there; a look at what a sequence makes
    is there for its members at once, and a node of its own only afterwards.
    """
    made: dict[fx.Node, int] = {}
    position: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        time = max((made[n] for n in before[node]), default=0)
        transparent = node not in members and _passes_on(node, places)
        if node in members:
            time += 1 - time % 2
        elif not transparent:
            time += time % 2
        made[node] = time
        position[node] = time if node in members else time + time % 2
    return made, position


def _passes_on(node: fx.Node, places: dict[fx.Node, Place]) -> bool:
    """Whether a node does nothing but name a part of a result, or memory that is known, in another way."""
    if node.target is operator.getitem or is_split(node):
        return True
    return looked_at(node) is not None and node in places and places[node].root is not node


def _sort(program: Program, position: dict[fx.Node, int]) -> None:
    """Order the calls by their positions, and where these are equal as they were."""
    calls = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    end = program.graph.output_node()
    for node in sorted(calls, key=lambda n: position[n]):
        end.prepend(node)


def _erase(program: Program, nodes: list[fx.Node]) -> None:
    """Erase those of the nodes that nothing reads, and then those that only they read."""
    rest = set(nodes)
    while idle := [n for n in rest if not n.users]:
        for node in idle:
            program.graph.erase_node(node)
        rest.difference_update(idle)


@dataclass
class _Group:
    """The members of one sequence, in order; `stored`: where constants lie that share memory; `moved`: what now gives the
    values that other sequences gave."""

    program: Program
    nodes: list[fx.Node]
    members: set[fx.Node]
    places: dict[fx.Node, Place]
    stored: dict[fx.Node, Stored]
    moved: dict[fx.Node, fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)
    numbers: dict[fx.Node, int] = field(default_factory=dict)
    views: dict[tuple[int, int, Kind], int] = field(default_factory=dict)

    def build(self) -> None:
        """Put the sequence before the first of the members, and let all else read its results."""
        own = {part for node in self.nodes for part in parts_of(node)}
        targets = [self.places[n.args[0]].root for n in self.nodes if n.target in WRITES]  # type: ignore[index]
        written_to = list(dict.fromkeys(n for n in targets if n not in own))
        read = dict.fromkeys(self.places[n].root for node in self.nodes for n in node.all_input_nodes)
        moved = [n for n in read if n in self.stored]
        from_outside = (self.stored[n].store if n in self.stored else n for n in read if n not in own)
        self.inputs = list(dict.fromkeys([*written_to, *from_outside]))
        self.numbers = {n: i for i, n in enumerate(self.inputs)}
        writer = Writer(len(written_to), [self._kind(n) for n in self.inputs])
        for n in moved:
            store, offset = self.stored[n]
            self.numbers[n] = writer.view(self.numbers[store], offset, self.places[n].kind)
        self.inputs = [self.moved.get(n, n) for n in self.inputs]
        for node in self.nodes:
            self._write(writer, node)
        parts = (part for node in self.nodes for part in parts_of(node))
        results = [part for part in parts if isinstance(part, fx.Node) and self._needed(part)]
        text = writer.text([(self.numbers[n], Kind.of(value(n))) for n in results])
        with self.program.graph.inserting_before(self.nodes[0]):
            rest = self.inputs[len(written_to) :]
            if written_to:
                given = [self._empty(n) for n in results]
                call = self.program.call(qc.sequence_writing.default, [*written_to, *given], rest, text)
            else:
                call = self.program.call(qc.sequence.default, rest, text)
                given = [getitem(self.program, call, i, n) for i, n in enumerate(results)]
        for node in self.nodes:
            call.meta["decisions"] = [*call.meta.get("decisions", ()), *node.meta.get("decisions", ())]
        self.moved.update(zip(results, given, strict=True))
        for old, new in zip(results, given, strict=True):
            self._replace(old, new)
        for node in self.nodes:
            if node.target in WRITES:
                self._replace(node, node.args[0])  # type: ignore[arg-type]

    def _kind(self, node: fx.Node) -> Kind:
        return self.places[node].kind if node in self.places else Kind.of(value(node))

    def _empty(self, node: fx.Node) -> fx.Node:
        own = value(node)
        sizes, strides = list(own.shape), list(own.stride())
        return self.program.call(
            torch.ops.aten.empty_strided.default, sizes, strides, dtype=own.dtype, device=own.device, like=node
        )

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        for user in list(old.users):
            if user not in self.members:
                user.replace_input_with(old, new)

    @functools.cached_property
    def _own(self) -> frozenset[fx.Node]:
        return frozenset(self.nodes)

    def _needed(self, node: fx.Node) -> bool:
        """Whether anything but members reads a value, itself or through views."""
        if node.target in WRITES:
            return False
        others = (user for user in node.users if user not in self._own)
        return any(not _passes_on(user, self.places) or self._needed(user) for user in others)

    def _write(self, writer: Writer, node: fx.Node) -> None:
        name, arguments = written(node)
        given = [self._argument(writer, a) for a in arguments]
        if node.target in WRITES:
            writer.step(name, given, [])
            return
        parts = parts_of(node)
        own = value(node)
        kinds = [Kind.of(t) for t in (own if isinstance(own, (list, tuple)) else [own])]
        for part, number in zip(parts, writer.step(name, given, kinds), strict=True):
            if isinstance(part, fx.Node):
                self.numbers[part] = number

    def _argument(self, writer: Writer, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._argument(writer, a) for a in argument]
        if not isinstance(argument, fx.Node):
            return argument
        place = self.places[argument]
        base = self.numbers[place.root]
        if place == self.places[place.root]:
            return base
        key = (base, place.offset, place.kind)
        if key not in self.views:
            self.views[key] = writer.view(base, place.offset, place.kind)
        return self.views[key]
