"""Rewrites as data: a pattern, a condition, a replacement.

A pattern is a Python function that looks like the code that it matches; its parameters are wildcards. It is traced once.
The replacement is a function of the same parameters. Matching starts at the pattern's result and walks up through the
arguments, which are compared by the names of the operator's schema, so that no call's way of passing defaults matters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from qcompile.passes.program import Program, inherit, normalized

Bindings = dict[str, Any]


@dataclass(frozen=True)
class Match:
    """Where a pattern matched: what its parameters stand for, and the calls that it covers."""

    bindings: Bindings
    inside: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: what the dump calls it.
        pattern: the function to match; each parameter binds any argument (twice the same one: the same node).
        replacement: what to put in its place; a subset of the pattern's parameters.
        where: a further condition on the bindings and the matched root node.
        shared: operators inside the pattern that other nodes may read too; they are copied, all others must be read by
            nothing outside the match.
    """

    name: str
    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    where: Callable[[Program, fx.Node, Bindings], bool] | None = None
    shared: tuple[object, ...] = ()

    @cached_property
    def _traced(self) -> tuple[fx.Graph, fx.Node]:
        graph = fx.symbolic_trace(self.pattern).graph
        return graph, _result(graph)

    @cached_property
    def _replacement(self) -> fx.Graph:
        unknown = set(inspect.signature(self.replacement).parameters) - set(inspect.signature(self.pattern).parameters)
        if unknown:
            raise ValueError(f"rule {self.name}: the replacement uses {sorted(unknown)}, which the pattern does not bind")
        return fx.symbolic_trace(self.replacement).graph

    @property
    def root(self) -> object:
        """The operator whose calls the rule is tried on."""
        return self._traced[1].target

    def match(self, program: Program, node: fx.Node) -> Match | None:
        """What the pattern's parameters stand for if it matches at ``node``, else None."""
        root = self._traced[1]
        bindings: Bindings = {}
        inside: dict[fx.Node, fx.Node] = {}
        if not _unify(root, node, bindings, inside):
            return None
        members = set(inside.values())
        for member in members:
            if member is node or member.target in self.shared:
                continue
            if any(user not in members for user in member.users):
                return None
        if self.where is not None and not self.where(program, node, bindings):
            return None
        return Match(bindings, tuple(inside.values()))

    def apply(self, program: Program, node: fx.Node, match: Match) -> fx.Node:
        """Put the replacement in; returns the node that took the place of ``node``."""
        environment: dict[fx.Node, Any] = {}
        with program.graph.inserting_before(node):
            for step in self._replacement.nodes:
                if step.op == "placeholder":
                    environment[step] = match.bindings[step.target]
                elif step.op == "call_function":
                    args, kwargs = fx.map_arg((step.args, step.kwargs), lambda n: environment[n])
                    environment[step] = program.call(step.target, *args, like=node, **kwargs)
                elif step.op == "output":
                    new = environment[step.args[0]]
        for member in match.inside:
            inherit(new, member)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        return new


def rewrite(program: Program, rules: Iterable[Rule]) -> dict[str, int]:
    """Apply ``rules`` to every node until none matches; returns how often each one did."""
    by_root: dict[object, list[Rule]] = {}
    counts: dict[str, int] = {}
    for rule in rules:
        by_root.setdefault(rule.root, []).append(rule)
        counts[rule.name] = 0
    changed = True
    while changed:
        changed = False
        for node in program.calls(*by_root):
            for rule in by_root[node.target]:
                match = rule.match(program, node)
                if match is not None:
                    rule.apply(program, node, match)
                    counts[rule.name] += 1
                    changed = True
                    break
    program.drop_dead()
    return counts


def _result(graph: fx.Graph) -> fx.Node:
    result = graph.output_node().args[0]
    if not isinstance(result, fx.Node) or result.op != "call_function":
        raise ValueError("a pattern must return the result of one operator call")
    return result


def _unify(pattern: Any, actual: Any, bindings: Bindings, inside: dict[fx.Node, fx.Node]) -> bool:
    """Match one argument; ``bindings`` collects the wildcards, ``inside`` which call each call of the pattern matched."""
    if isinstance(pattern, fx.Node):
        if pattern in inside:
            return inside[pattern] is actual
        if pattern.op == "placeholder":
            name = str(pattern.target)
            if name in bindings:
                return bindings[name] is actual or (not isinstance(actual, fx.Node) and bindings[name] == actual)
            bindings[name] = actual
            return True
        if not isinstance(actual, fx.Node) or actual.op != "call_function" or actual.target is not pattern.target:
            return False
        if isinstance(actual.target, torch._ops.OpOverload):
            wanted, given = normalized(pattern), normalized(actual)
        else:
            wanted, given = _positional(pattern), _positional(actual)
        inside[pattern] = actual
        return wanted.keys() == given.keys() and all(_unify(wanted[k], given[k], bindings, inside) for k in wanted)
    if isinstance(pattern, (list, tuple)):
        return (
            isinstance(actual, (list, tuple))
            and len(pattern) == len(actual)
            and all(_unify(p, a, bindings, inside) for p, a in zip(pattern, actual, strict=True))
        )
    return type(pattern) is type(actual) and pattern == actual


def _positional(node: fx.Node) -> dict[str, Any]:
    return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
