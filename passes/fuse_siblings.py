"""Linears that read the same input become one: read off the graph, never off names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.passes.base import Pass
from qcompile.passes.fuse_epilogues import has_epilogue
from qcompile.passes.program import Program, getitem, normalized

qc = torch.ops.qcompile


@dataclass(frozen=True)
class FuseSiblings(Pass):
    """Stack the weights of linears that read the same tensor and have the same scheme::

              ┌► linear(q) ►              ┌► [0] ►
        x ────┼► linear(k) ►     ->  x ─► linear_split ─► [1] ►
              └► linear(v) ►              └► [2] ►

    One product has more rows to share between threads, and the activation is read (and quantized) once.

    Attributes:
        max_rows: a linear with more rows gains nothing and stays by itself.

    Before: fused operators with plain epilogues. After: as before, no two small siblings are left.
    """

    max_rows: int = 32768

    def run(self, program: Program) -> int:
        """Rewrite; returns how many groups of siblings were merged."""
        if not program.inference:
            return 0
        groups: dict[tuple[object, ...], list[fx.Node]] = {}
        for node in program.calls(qc.linear.default):
            args = normalized(node)
            columns, kind = args["shape"][1], str(args["scheme"])
            if args["shape"][0] <= self.max_rows and not has_epilogue(node) and _stackable(kind):
                groups.setdefault((args["x"], columns, kind, args["bias"] is None), []).append(node)
        merged = 0
        for nodes in groups.values():
            nodes = _distinct_weights(nodes)
            if len(nodes) > 1:
                self._merge(program, nodes)
                merged += 1
        program.clean()
        return merged

    def _merge(self, program: Program, nodes: list[fx.Node]) -> None:
        all_args = [normalized(n) for n in nodes]
        first = all_args[0]
        stacked = {
            part: None if first[part] is None else _stack(program, [a[part] for a in all_args])
            for part in ("data", "scale", "zero", "bias")
        }
        sizes = [a["shape"][0] for a in all_args]
        shape = [sum(sizes), first["shape"][1]]
        with program.graph.inserting_before(nodes[0]):
            split = program.call(
                qc.linear_split.default, first["x"], stacked["data"], stacked["scale"], stacked["zero"], stacked["bias"],
                first["scheme"], shape, sizes, like=nodes[0],
            )  # fmt: skip
            parts = [getitem(program, split, i, node) for i, node in enumerate(nodes)]
        for node, part in zip(nodes, parts, strict=True):
            node.replace_all_uses_with(part)
            program.graph.erase_node(node)
        # At once, not after the pass: what was stacked must not be in memory twice for all layers.
        program.drop_unread({a[part] for a in all_args for part in ("data", "scale", "zero", "bias")} - {None})


def _stackable(scheme: str) -> bool:
    """Whether scale and codes of two such weights can be stacked row by row."""
    return "/channel=0/" in scheme or "/group=" in scheme


def _distinct_weights(nodes: list[fx.Node]) -> list[fx.Node]:
    """One node for each weight: a weight that is applied twice to the same input needs no second copy."""
    seen: set[object] = set()
    kept = []
    for node in nodes:
        data = normalized(node)["data"]
        if data not in seen:
            seen.add(data)
            kept.append(node)
    return kept


def _stack(program: Program, parts: list[fx.Node]) -> fx.Node:
    constants = [program.constant(p) for p in parts]
    if any(c is None for c in constants):
        # A bias that is computed at run time (a cast, say) is stacked at run time.
        with program.graph.inserting_after(max(parts, key=_position(program))):
            return program.call(torch.ops.aten.cat.default, parts, 0)
    known = [c for c in constants if c is not None]
    identity = None if any(c.identity is None for c in known) else ("stack", *(c.identity for c in known))
    name = "+".join(c.name for c in known)

    def make() -> Tensor:
        return torch.cat([c.tensor.detach() for c in known])

    return program.add_constant(name, program.remember(identity, make, *(c.tensor for c in known)), identity=identity)


def _position(program: Program) -> Callable[[fx.Node], int]:
    """Where each node stands in the graph."""
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    return order.__getitem__
