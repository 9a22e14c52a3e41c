"""The one graph that every pass works on, wherever the model came from.

A :class:`Program` is a graph of aten operators as they stand before autograd decomposes them, in which *everything* that
flows in is a placeholder: the user's inputs, and the constants (parameters, buffers) by the names that the user gave
them. The front ends make it and take it apart again; a pass never asks which front end that was.
"""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qcompile.kernels.dispatch import Packed
from qcompile.passes.decision import Decision
from qcompile.passes.fakes import FakeValues, fake_of

T = TypeVar("T")

#: What a node hands on to the nodes that take its place.
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


class FreedError(RuntimeError):
    """A pass needs values of which an earlier program kept another form only."""


@dataclass
class Constant:
    """A tensor that the program holds.

    Attributes:
        name: the user's name for it (``"layers.0.mlp.up.weight"``), or one derived from such a name.
        tensor: its value.
        aliases: other names of the same tensor.
        is_parameter: a parameter, not a buffer.
        receives_grad: gradients flow to it, so its value will change.
        mutated: the graph writes to it.
        fixed: nothing outside of the program changes its value either, now or later.
        index: its place among the placeholders that the front end brought; None for one that a pass added.
        identity: equal for two constants that hold the same value for as long as the process lives; lets a front end
            that meets a weight again reuse what was made of it. None where nobody keeps track.
        fresh: made for this program, so that no other one reads it yet.
        parts: the tensors that lie in this one, where it is memory that several share.
        holds: where it is a box, the places of what it holds among the placeholders that the front end brought.
    """

    name: str
    tensor: Tensor
    aliases: tuple[str, ...] = ()
    is_parameter: bool = True
    receives_grad: bool = False
    mutated: bool = False
    fixed: bool = False
    index: int | None = None
    identity: tuple[object, ...] | None = None
    fresh: bool = False
    parts: tuple[Tensor, ...] = ()
    holds: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All its names."""
        return (self.name, *self.aliases)


@dataclass
class Site:
    """A matmul-like node whose weight is a constant.

    Attributes:
        node: the node that computes.
        weight: the placeholder of the weight, rows first, the reduction axis last.
        uses: the nodes through which the weight flows in (``node`` itself, or a view that it reads).
        decision: its row in the report.
    """

    node: fx.Node
    weight: fx.Node
    uses: tuple[fx.Node, ...]
    decision: Decision


@dataclass(frozen=True)
class Original:
    """What a weight's codes were unpacked from, when the program came with a packed weight.

    Attributes:
        pack: the function that packs into this layout.
        packed: the packed weight.
    """

    pack: Callable[..., Packed]
    packed: Packed


@dataclass
class Program:
    """A graph and its constants.

    Attributes:
        module: holds the graph; its inputs are all placeholders.
        constants: by the name of their placeholder node.
        fake_mode: the mode that the ``meta["val"]`` of all nodes belong to.
        decisions: what was decided for each matmul-like node, for the report.
        sites: the matmul-like nodes with a constant weight, as canonicalization found them.
        inference: no gradient flows through the program.
        memo: what was computed from constants with an identity; a front end that compiles many graphs of one model shares
            it among them, so that each weight is quantized and packed once.
        originals: by the placeholder of the codes, what they were unpacked from.
        progress: wraps an iterable of long work to show its progress, as tqdm does.
    """

    module: fx.GraphModule
    constants: dict[str, Constant]
    fake_mode: FakeTensorMode
    decisions: list[Decision] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    inference: bool = True
    memo: MutableMapping[tuple[object, ...], Any] = field(default_factory=dict)
    originals: dict[str, Original] = field(default_factory=dict)
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None

    def __post_init__(self) -> None:
        self._values = FakeValues(self.fake_mode)
        # Constants come by the thousand: what is asked for each of them must not take longer the more there are.
        self._users_of_name = Counter(c.name for c in self.constants.values())
        self._last: fx.Node | None = None

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.module.graph

    def track(self, items: Iterable[T], what: str) -> Iterable[T]:
        """``items``, with a progress bar where the front end shows one."""
        return items if self.progress is None else self.progress(list(items), what)

    def remember(self, key: tuple[object, ...] | None, make: Callable[[], T], *sources: Tensor | None) -> T:
        """``make()``, computed once for each key; None is no key.

        Raises:
            FreedError: it has to be made, and one of the tensors that it is made from is a meta tensor.
        """
        if key is None:
            return make()
        if key in self.memo:
            return self.memo[key]
        if any(t is not None and t.is_meta for t in sources):
            raise FreedError(f"{key[0]} must be made from values that were freed: {key}")
        made = self.memo[key] = make()
        return made

    def first_call(self) -> fx.Node:
        """The first node that is not a placeholder."""
        return next(n for n in self.graph.nodes if n.op != "placeholder")

    def constant(self, node: object) -> Constant | None:
        """The constant that ``node`` is the placeholder of, or None."""
        if isinstance(node, fx.Node) and node.op == "placeholder":
            return self.constants.get(node.name)
        return None

    def calls(self, *targets: object) -> list[fx.Node]:
        """All call nodes with one of these targets, in graph order; with no target, all call nodes."""
        return [n for n in self.graph.nodes if n.op == "call_function" and (not targets or n.target in targets)]

    def add_constant(
        self, name: str, tensor: Tensor, *, like: Constant | None = None, identity: tuple[object, ...] | None = None
    ) -> fx.Node:
        """Add a placeholder for a new constant, before the first call of the graph.

        Args:
            name: its name; a number is appended where it is taken by another constant than ``like``.
            like: the constant of which the new one is a view; it hands on its names and properties.
            identity: see :class:`Constant`.
        """
        final, count = name, 1
        while self._users_of_name[final] > (like is not None and like.name == final):
            count += 1
            final = f"{name}_{count}"
        self._users_of_name[final] += 1
        last = self._last_placeholder()
        place = (
            self.graph.inserting_before(next(iter(self.graph.nodes))) if last is None else self.graph.inserting_after(last)
        )
        with place:
            self._last = node = self.graph.placeholder("c_" + re.sub(r"\W", "_", final))
        node.meta["val"] = self._fake(tensor)
        if like is None:
            self.constants[node.name] = Constant(final, tensor, is_parameter=False, fixed=True, identity=identity)
        else:
            self.constants[node.name] = replace(like, name=final, tensor=tensor, index=None, identity=identity)
        return node

    def _last_placeholder(self) -> fx.Node | None:
        """The last placeholder, from the one that was added last on; None where there is none."""
        last, graph = self._last, self.graph
        if last is None or last._erased or last.graph is not graph:
            last = next(iter(graph.nodes), None)
        if last is None or last.op != "placeholder":
            return None
        while last.next.op == "placeholder":
            last = last.next
        return last

    def _fake(self, tensor: Tensor) -> Tensor:
        """The fake value of a constant; one of which only the shape is left stands where the program's constants are."""
        if not tensor.is_meta:
            return fake_of(tensor, self.fake_mode)
        with self.fake_mode:
            home = next(n.meta["val"].device for n in self.graph.nodes if self.constant(n) is not None)
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=home)

    def call(self, target: Callable[..., Any], *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """Add a call at the graph's insertion point, with the fake value computed and the origin copied from ``like``."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.evaluate(node)
        if like is not None:
            inherit(node, like)
        return node

    def evaluate(self, node: fx.Node) -> Any:
        """The fake value of a call node, computed from the fake values of its inputs."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        return self._values(node.target, args, kwargs)  # type: ignore[arg-type]

    def drop_unread(self, nodes: Iterable[object]) -> int:
        """Drop those of the placeholders ``nodes`` that are constants which no call reads, and free their tensors."""
        gone = 0
        for node in nodes:
            if isinstance(node, fx.Node) and self.constant(node) is not None and not node.users:
                self.graph.erase_node(node)
                self._users_of_name[self.constants.pop(node.name).name] -= 1
                gone += 1
        return gone

    def drop_dead(self) -> None:
        """Drop calls that nothing reads and that do nothing else.

        As ``Graph.eliminate_dead_code``, which checks the whole graph's form each time and asks every node what it does.
        """
        random = torch._guards.TracingContext.try_get() is None or torch._inductor.config.fallback_random
        for node in reversed(self.graph.nodes):
            if not node.users and not node.is_impure(random):
                self.graph.erase_node(node)

    def clean(self) -> int:
        """Drop calls that nothing reads and constants that no call reads; returns how many constants went."""
        self.drop_dead()
        return self.drop_unread(list(self.graph.nodes))

    def recompile(self) -> None:
        """Check the graph's form and regenerate the module's code."""
        self.graph.lint()
        self.module.recompile()


def inherit(node: fx.Node, origin: fx.Node) -> None:
    """Copy to ``node`` where ``origin`` came from: module path, source line, the user's own annotations."""
    for key in _INHERITED:
        if key in origin.meta and key not in node.meta:
            node.meta[key] = dict(origin.meta[key]) if key == "custom" else origin.meta[key]
    decisions = [*node.meta.get("decisions", ())]
    decisions += [d for d in origin.meta.get("decisions", ()) if all(d is not e for e in decisions)]
    if decisions:
        node.meta["decisions"] = decisions


def value(node: object) -> Any:
    """The fake value of a node (``meta["val"]``); a plain argument is its own value."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_tensor(node: object) -> bool:
    """Whether ``node`` is a node with one tensor for value."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), (FakeTensor, Tensor))


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a tensor node; sizes may be symbolic."""
    return tuple(node.meta["val"].shape)


def static_shape(node: object) -> tuple[int, ...] | None:
    """The shape of a tensor node if all of its sizes are known numbers, else None."""
    if not is_tensor(node):
        return None
    sizes = shape_of(node)  # type: ignore[arg-type]
    return sizes if all(isinstance(s, int) for s in sizes) else None


def normalized(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by the names of its schema, defaults filled in."""
    named: dict[str, Any] = {}
    for i, (name, has_default, default) in enumerate(_parameters(node.target)):
        if i < len(node.args):
            named[name] = node.args[i]
        elif name in node.kwargs:
            named[name] = node.kwargs[name]
        elif has_default:
            named[name] = list(default) if type(default) is list else default
    return named


@functools.cache
def _parameters(target: Any) -> tuple[tuple[str, bool, Any], ...]:
    """Name of each argument of an operator, whether it has a default, and which: torch makes them anew at each look."""
    arguments = target._schema.arguments
    return tuple((a.name, a.has_default_value(), a.default_value if a.has_default_value() else None) for a in arguments)


def inputs_of(node: fx.Node) -> Iterator[fx.Node]:
    """All nodes that ``node`` reads."""
    yield from node.all_input_nodes


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node came from; empty where the trace does not say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    # What torch.export writes for a node that no module's code made.
    return "" if path.startswith("_empty_nn_module_stack") else clean_path(path)


def clean_path(path: str) -> str:
    """``L['self'].layers[0].mlp`` and ``L__self___layers_0`` style paths as ``layers.0.mlp``."""
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", path)
    path = re.sub(r"_(modules|parameters|buffers)\b", "", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    return re.sub(r"\.{2,}", ".", path).strip(".")


def getitem(program: Program, source: fx.Node, index: int, like: fx.Node) -> fx.Node:
    """Add the node that takes output ``index`` of ``source``."""
    return program.call(operator.getitem, source, index, like=like)
