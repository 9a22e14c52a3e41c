"""Packed linears that feed one another, and the norms between them, become one operator."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qcompile.kernels.ops.linear_chain import MOST_ROWS, MOST_STAGES, Stage
from qcompile.passes.base import Pass
from qcompile.passes.program import Program, getitem, normalized, shape_of, static_shape, value
from qcompile.passes.remove_identities import plain
from qcompile.passes.writes import is_mutable

aten = torch.ops.aten
qc = torch.ops.qcompile

_LINEARS = (qc.linear_tiled.default, qc.linear_tiled_split.default)


@dataclass(frozen=True)
class ChainLinears(Pass):
    """Compute linears over few rows that follow one another in one call, with the norms between them::

        a ─► linear(+ r) ─► h ─► rms_norm ─► linear(glu) ─► linear(+ h) ─► h2 ─► rms_norm ─► linear_split
                                                        ->   h2, q, k, v = linear_chain(a, r)

    A step over one token calls hundreds of operators that take a few microseconds each; every call and every parallel
    region costs about as much again. Only on the CPU, for a known number of at most 8 rows, for inference, where
    activations may be rounded by the kernel, and where nothing in between writes to memory. A norm that linears alone read,
    root mean square or layer norm, goes into their stages; a layer norm that is read elsewhere, too, is a stage.

    (Over many rows the same was tried, a block of rows through all stages in one thread's cache: it gained nothing on
    encoders and lost 5 % on prompts.)

    Before: packed; norms found. After: the same results up to rounding.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many linears went into chains."""
        if not program.inference:
            return 0
        chains: list[_Chain] = []
        current: _Chain | None = None
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        for node in order:
            if is_mutable(node):
                current = None
            if node.target is aten.layer_norm.default:
                alone = _norm(node) is not None and not _read_by_linears_alone(node)
                if alone and current is not None and current.takes(node):
                    current.add(node)
                continue
            if node.target not in _LINEARS or not _fits(node):
                continue
            if current is None or not current.takes(node):
                current = _Chain(order)
                chains.append(current)
            current.add(node)
        return sum(chain.build(program) for chain in chains)


def _fits(node: fx.Node) -> bool:
    args = normalized(node)
    x = args["x"]
    shape = static_shape(x)
    if shape is None or value(x).device.type != "cpu" or torch.Size(shape[:-1]).numel() > MOST_ROWS:
        return False
    return not (args["exact"] or args["per_row"]) and args["x_scale"] is None and args.get("mul") is None


@dataclass(frozen=True)
class _Norm:
    """A norm taken apart; weight None: there is none, and source is what a linear reads itself."""

    source: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    centered: bool = False
    eps: float = 0.0


def _norm(node: fx.Node) -> _Norm | None:
    """A norm over the last axis that has a weight and keeps the dtype; None for anything else."""
    if node.target not in (aten.rms_norm.default, aten.layer_norm.default):
        return None
    args = normalized(node)
    source, weight, bias = plain(args["input"]), args["weight"], args.get("bias")
    if args["normalized_shape"] != [shape_of(source)[-1]] or value(source).dtype != value(node).dtype:
        return None
    if weight is None or args["eps"] is None:
        return None
    if bias is not None and value(bias).dtype != value(weight).dtype:
        return None
    return _Norm(source, weight, bias, node.target is aten.layer_norm.default, float(args["eps"]))


def _read_by_linears_alone(norm: fx.Node) -> bool:
    def read(user: fx.Node) -> bool:
        return user.target in _LINEARS and normalized(user).get("add") is not norm

    return all(map(read, norm.users))


def _read(node: fx.Node) -> _Norm:
    """What a stage reads, and the norm that goes with it."""
    if node.target not in _LINEARS:
        found = _norm(node)
        return found if found is not None else _Norm(node)
    x = plain(normalized(node)["x"])
    found = _norm(x)
    # a root mean square norm is computed again by each of its readers, sooner than waited for
    return found if found is not None and (not found.centered or _read_by_linears_alone(x)) else _Norm(x)


def _outputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that a linear gives: itself, or its parts; or a norm: itself."""
    if node.target is not qc.linear_tiled_split.default:
        return [node]
    parts: list[Any] = [None] * len(normalized(node)["sizes"])
    for user in node.users:
        if user.target is operator.getitem:
            parts[user.args[1]] = user  # type: ignore[index]
    return parts


@dataclass
class _Chain:
    """Linears and layer norms in their order; values are numbered as the operator numbers them, inputs as they are met."""

    order: dict[fx.Node, int]
    nodes: list[fx.Node] = field(default_factory=list)

    def made(self) -> set[fx.Node]:
        """What the linears give."""
        return {part for node in self.nodes for part in _outputs(node) if part is not None}

    def takes(self, node: fx.Node) -> bool:
        """Whether ``node`` may come next."""
        made = self.made()
        source = _read(node).source
        if len(self.nodes) >= MOST_STAGES or source not in made:
            return False
        first = normalized(self.nodes[0])["x"]
        if shape_of(first)[:-1] != shape_of(source)[:-1] or value(first).dtype != value(source).dtype:
            return False
        # Everything moves to where the last one is: nobody else may have asked before.
        outside = _Chain(self.order, [*self.nodes, node]).readers()
        return all(self.order[user] > self.order[node] for users in outside.values() for user in users)

    def readers(self) -> dict[fx.Node, list[fx.Node]]:
        """Who reads each value, but for the linears and what only they read: norms and casts between them."""
        own = {*self.nodes, *self.made()}

        def inside(user: fx.Node) -> bool:
            passed = user.target in (aten.rms_norm.default, aten.layer_norm.default, aten.to.dtype)
            return user in own or (passed and bool(user.users) and all(map(inside, user.users)))

        return {part: [user for user in part.users if not inside(user)] for part in self.made()}

    def add(self, node: fx.Node) -> None:
        """Append a linear or a norm."""
        self.nodes.append(node)

    def build(self, program: Program) -> int:
        """Put the operator in the place of the linears; returns how many there were."""
        if len(self.nodes) == 1 and _read(self.nodes[0]).weight is None:
            return 0
        writer = _Writer(self)
        stages = [writer.stage(node) for node in self.nodes]
        readers = self.readers()
        results = [v for v in writer.made if readers.get(v)]
        flat = [n for stage in stages for n in stage.numbers()]
        last = self.nodes[-1]
        with program.graph.inserting_before(last):
            numbers = [writer.values.index(v) for v in results]
            chain = program.call(qc.linear_chain.default, writer.inputs, writer.constants, flat, writer.eps, numbers)
            parts = [getitem(program, chain, i, v) for i, v in enumerate(results)]
        for node in self.nodes:
            chain.meta["decisions"] = [*chain.meta.get("decisions", ()), *node.meta.get("decisions", ())]
        for old, new in zip(results, parts, strict=True):
            for user in readers[old]:
                user.replace_input_with(old, new)
        # What lies between the linears still reads them; it goes with them, last first.
        program.drop_dead()
        return len(self.nodes)


class _Writer:
    """Numbers the values and constants of a chain."""

    def __init__(self, chain: _Chain) -> None:
        self.inputs: list[fx.Node] = []
        self.made: list[fx.Node] = []
        self.constants: list[fx.Node] = []
        self.eps: list[float] = []
        own = chain.made()
        for node in chain.nodes:
            for v in (_read(node).source, normalized(node).get("add")):
                if v is not None and plain(v) not in own and plain(v) not in self.inputs:
                    self.inputs.append(plain(v))
        # Parts that nobody reads have a number, too.
        self.made = [part if part is not None else node for node in chain.nodes for part in _outputs(node)]

    @property
    def values(self) -> list[fx.Node]:
        return [*self.inputs, *self.made]

    def stage(self, node: fx.Node) -> Stage:
        args = normalized(node)
        read, add = _read(node), args.get("add")
        self.eps.append(read.eps)
        if node.target not in _LINEARS:
            args = {"bits": 0, "group_size": 0}
            parts: tuple[int, ...] = (shape_of(node)[-1],)
        elif node.target is qc.linear_tiled_split.default:
            parts = tuple(args["sizes"])
        else:
            parts = (args["out_features"],)
        held = {name: self._constant(args.get(name)) for name in ("codes", "scale", "zero", "bias")}
        return Stage(
            source=self.values.index(read.source),
            norm=self._constant(read.weight),
            norm_bias=self._constant(read.bias),
            centered=read.centered,
            **held,
            bits=args["bits"],
            group_size=args["group_size"],
            activation=args.get("activation", "none"),
            glu=args.get("glu", False),
            add=-1 if add is None else self.values.index(plain(add)),
            parts=parts,
        )

    def _constant(self, node: fx.Node | None) -> int:
        if node is None:
            return -1
        if node not in self.constants:
            self.constants.append(node)
        return self.constants.index(node)
