"""Calls like an earlier one: while a graph is traced, their nodes are written again instead of being traced again."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_mode
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from qcompile.passes.fakes import UnlikeError, described, is_pure, key_of, skeleton_of

__all__ = ["Repeats"]

#: What tracing writes about a node because of the node of Dynamo's graph that it is at, not because of the operator.
_OF_THE_PLACE = frozenset({"stack_trace", "seq_nr", *fx.proxy._COPY_META_FIELDS}) - {"original_aten", "torch_fn"}


@dataclass(frozen=True)
class _Place:
    """Stands for a node in what was recorded: first the nodes of the inputs, then those that were traced."""

    number: int


@dataclass(frozen=True)
class _Step:
    """One node that a call was traced to, with places where its arguments are nodes."""

    target: Any
    name: str
    args: Any
    kwargs: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Made:
    """A tensor that a call gave: the place of its node, and a meta tensor of its shape and strides."""

    place: _Place
    like: Tensor
    device: torch.device


@dataclass(frozen=True)
class _Same:
    """An input that a call gave back: what reads it from then on reads the node at this place."""

    place: _Place
    number: int


@dataclass(frozen=True)
class _Recorded:
    """What a call was traced to, and what it gave, as leaves of a tree."""

    steps: tuple[_Step, ...]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec


class Repeats:
    """Calls that were traced before with arguments of the same kind: their nodes are written again, not traced again.

    A model's layers are alike, and nearly all of tracing is repetition: it took as long as all passes together.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Hashable, _Recorded | None] = {}

    def __call__(self, call: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``call(target, args, kwargs)`` gives, with the same nodes traced."""
        proxies = get_proxy_mode()
        if proxies is None or isinstance(target, torch._ops.HigherOrderOperator):
            return call(target, args, kwargs)
        tracer: Any = proxies.tracer
        tensors: dict[int, Tensor] = {}
        with torch._C.DisableTorchFunction():
            try:
                given = key_of(args, self._mode, tensors), key_of(kwargs, self._mode, tensors)
                nodes = [_node_of(t, tracer) for t in tensors.values()]
            except UnlikeError:
                nodes = []
            key = (target, torch.is_grad_enabled(), *given) if nodes else None
            known = self._known.get(key)
            if known is not None:
                return self._repeat(known, nodes, list(tensors.values()), tracer)
        if key is None or key in self._known:
            return call(target, args, kwargs)
        last = next(iter(reversed(tracer.graph.nodes)))
        result = call(target, args, kwargs)
        with torch._C.DisableTorchFunction():
            self._known[key] = self._record(last, nodes, list(tensors.values()), result, tracer)
        return result

    def _record(
        self, last: fx.Node, nodes: list[fx.Node], tensors: list[Tensor], result: Any, tracer: Any
    ) -> _Recorded | None:
        """What was traced after ``last``; None if it may be another thing the next time."""
        places = {node: _Place(i) for i, node in enumerate(nodes)}
        if len(places) < len(nodes):
            return None
        steps = []
        try:
            for node in _after(last):
                target: Any = node.target
                if node.op != "call_function" or not (target is operator.getitem or is_pure(target)):
                    return None
                args, kwargs = pytree.tree_map_only(fx.Node, places.__getitem__, (node.args, node.kwargs))
                meta = {k: v for k, v in node.meta.items() if k not in _OF_THE_PLACE}
                name = "getitem" if target is operator.getitem else target.overloadpacket.__name__
                steps.append(_Step(target, tracer.graph._target_to_str(name), args, kwargs, meta))
                places[node] = _Place(len(places))
            leaves, spec = pytree.tree_flatten(result)
            return _Recorded(tuple(steps), tuple(self._leaf(leaf, places, tensors, tracer) for leaf in leaves), spec)
        except (UnlikeError, KeyError):
            return None

    def _leaf(self, leaf: Any, places: dict[fx.Node, _Place], tensors: list[Tensor], tracer: Any) -> Any:
        if not isinstance(leaf, Tensor):
            key_of(leaf, self._mode, {})
            return leaf
        for i, given in enumerate(tensors):
            if leaf is given:
                return _Same(places[_node_of(leaf, tracer)], i)
        described(leaf, self._mode)
        if leaf.requires_grad or not isinstance(leaf, FakeTensor):
            raise UnlikeError
        with _disable_current_modes():
            return _Made(places[_node_of(leaf, tracer)], skeleton_of(leaf), leaf.fake_device)

    def _repeat(self, known: _Recorded, nodes: list[fx.Node], tensors: list[Tensor], tracer: Any) -> Any:
        nodes, place = list(nodes), _place()
        for step in known.steps:
            args, kwargs = map_aggregate(
                (step.args, step.kwargs), lambda given: nodes[given.number] if type(given) is _Place else given
            )
            # The tracer's own way asks of each operator again what it asked of the first.
            node = tracer.graph.create_node("call_function", step.target, args, kwargs, step.name)
            node.meta.update(place | step.meta)
            if (number := fx.proxy._get_seq_nr(node.name)) is not None:
                node.meta["seq_nr"] = number
            nodes.append(node)
        leaves = list(known.leaves)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, _Made | _Same):
                leaves[i] = (
                    FakeTensor(self._mode, leaf.like, leaf.device) if isinstance(leaf, _Made) else tensors[leaf.number]
                )
                tracer.tensor_tracker[leaves[i]] = _ProxyTensor(tracer.proxy(nodes[leaf.place.number]), None)
        return pytree.tree_unflatten(leaves, known.spec)


def _place() -> dict[str, Any]:
    """What tracing writes about each node at the node of Dynamo's graph that it is at."""
    current = fx.traceback.get_current_meta()
    return {name: copy.copy(current[name]) for name in ("stack_trace", *fx.proxy._COPY_META_FIELDS) if name in current}


def _node_of(tensor: Tensor, tracer: Any) -> fx.Node:
    """The node of a tensor whose value tracing does not know."""
    held = tracer.tensor_tracker.get(tensor)
    if held is None or held.constant is not None:
        raise UnlikeError
    node: fx.Node = held.proxy.node
    return node


def _after(last: fx.Node) -> Iterator[fx.Node]:
    node = last.next
    while node.op != "root":
        yield node
        node = node.next
