"""Runs of the CPU's operators become one call."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qcompile.kernels.ops.sequence import Kind, Writer
from qcompile.passes.base import Pass
from qcompile.passes.constant_store import Stored, store_constants
from qcompile.passes.effects import roots, understood, waits
from qcompile.passes.held import Held, drop_held, hold_inputs
from qcompile.passes.program import Program, getitem, value
from qcompile.passes.rotations import rotations
from qcompile.passes.sequence_members import feeding, members_of, passes_on, places_of, read_outside
from qcompile.passes.sequence_steps import WRITES, Place, is_large, parts_of, written

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
        members = members_of(program, shared)
        while True:
            places = places_of(program, members)
            made, position = _positions(program, members, places, before)
            groups: dict[int, list[fx.Node]] = {}
            for node in program.graph.nodes:
                if node in members:
                    groups.setdefault(made[node], []).append(node)
            poor = {n for group in groups.values() if sum(map(is_large, group)) < 2 for n in group}
            if not poor:
                break
            members -= poor
            members = feeding(program, members, places)
        if not groups:
            return 0
        _sort(program, position)
        # In the program's order, which is another process's, too: else no cache would find it compiled.
        steps = (n for n in program.graph.nodes if n in members)
        read = dict.fromkeys(places[n].root for m in steps for n in m.all_input_nodes)
        stored = store_constants(program, read)
        outside = read_outside(program, members, places, shared)
        held = hold_inputs(program, [n for n in read if n not in stored and n not in outside])
        moved: dict[fx.Node, fx.Node] = {}
        for _, group in sorted(groups.items()):
            _Group(program, group, members, places, stored, held, moved).build()
        _erase(program, [n for n in program.calls() if n in members or passes_on(n, places)])
        program.drop_unread(stored)
        drop_held(program, held)
        return len(members)


def _merge_parts(program: Program) -> None:
    """One node for each part of a result."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in program.calls(operator.getitem):
        kept = first.setdefault(node.args, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            program.graph.erase_node(node)


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
        transparent = node not in members and passes_on(node, places)
        if node in members:
            time += 1 - time % 2
        elif not transparent:
            time += time % 2
        made[node] = time
        position[node] = time if node in members else time + time % 2
    return made, position


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
    """The members of one sequence, in order; `stored`: where constants lie that share memory; `held`: in which box inputs
    are; `moved`: what now gives the values that other sequences gave."""

    program: Program
    nodes: list[fx.Node]
    members: set[fx.Node]
    places: dict[fx.Node, Place]
    stored: dict[fx.Node, Stored]
    held: dict[fx.Node, Held]
    moved: dict[fx.Node, fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)
    numbers: dict[fx.Node, int] = field(default_factory=dict)
    views: dict[tuple[int, int, Kind], int] = field(default_factory=dict)

    def build(self) -> None:
        """Put the sequence before the first of the members, and let all else read its results."""
        own = {part for node in self.nodes for part in parts_of(node)}
        targets = [self.places[n.args[0]].root for n in self.nodes if n.target in WRITES]  # type: ignore[index]
        written_to = list(dict.fromkeys(self._given(n) for n in targets if n not in own))
        read = dict.fromkeys(self.places[n].root for node in self.nodes for n in node.all_input_nodes)
        from_outside = (self._given(n) for n in read if n not in own)
        self.inputs = list(dict.fromkeys([*written_to, *from_outside]))
        self.numbers = {n: i for i, n in enumerate(self.inputs)}
        writer = Writer(len(written_to), [self._kind(n) for n in self.inputs])
        for n in read:
            if n in self.stored:
                store, offset = self.stored[n]
                self.numbers[n] = writer.view(self.numbers[store], offset, self.places[n].kind)
            elif n in self.held:
                box, place = self.held[n]
                self.numbers[n] = writer.held(self.numbers[box], place, self.places[n].kind)
        self.inputs = [self.moved.get(n, n) for n in self.inputs]
        turned, within = rotations(self.nodes, self.places)
        for node in self.nodes:
            if node not in within:
                self._write(writer, node, ("rotate", turned[node]) if node in turned else written(node))
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

    def _given(self, node: fx.Node) -> fx.Node:
        """What the call is given for an input."""
        if node in self.stored:
            return self.stored[node].store
        return self.held[node].box if node in self.held else node

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
        return any(not passes_on(user, self.places) or self._needed(user) for user in others)

    def _write(self, writer: Writer, node: fx.Node, step: tuple[str, list[Any]]) -> None:
        name, arguments = step
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
