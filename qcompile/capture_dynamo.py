"""From a graph that Dynamo captured to a :class:`~qcompile.passes.program.Program`.

Dynamo's graph speaks torch functions and tensor methods. It is traced once more, before autograd and with Dynamo's own
fake tensors, so that the passes see the same aten operators as in an exported program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ChainedSource, LocalSource
from torch._guards import Source
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qcompile.captured import Captured, assemble, fake_of_weight
from qcompile.owned import is_owned
from qcompile.passes.program import Constant, clean_path
from qcompile.retrace import retrace
from qcompile.weight_cache import WeightCache


def from_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any], cache: WeightCache) -> Captured:
    """A program from Dynamo's graph; the parameters that modules hold become its constants.

    Raises:
        CaptureError: something in the graph cannot be traced.
    """
    sources = tuple(gm.graph.find_nodes(op="placeholder"))
    mode = _fake_mode(sources)
    constants: dict[int, Constant] = {}
    fakes = []
    grad = torch.is_grad_enabled()
    for i, (node, given) in enumerate(zip(sources, example_inputs, strict=True)):
        fake = node.meta["example_value"]
        if isinstance(given, Tensor) and _is_held(node, given):
            tensor, fake = fake_of_weight(given, cache, mode, fake)
            constants[i] = Constant(
                _name(node), tensor, is_parameter=isinstance(given, torch.nn.Parameter),
                receives_grad=grad and given.requires_grad, index=i, identity=cache.identity(given),
            )  # fmt: skip
        fakes.append(fake)
    module = retrace(gm, fakes, mode)
    steady = constants.keys() | {i for i, t in enumerate(example_inputs) if is_owned(t)}
    return assemble(module, example_inputs, constants, mode, cache, steady=steady, sources=sources)


def keep_inputs(gm: fx.GraphModule, kept: Sequence[int]) -> None:
    """Take the inputs that are not kept out of Dynamo's own graph: it then passes the others only."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    gm.graph.output_node().args = ((),)
    for node in reversed(list(gm.graph.nodes)):
        if node.op not in ("placeholder", "output"):
            gm.graph.erase_node(node)
    for i, node in enumerate(placeholders):
        if i not in set(kept):
            gm.graph.erase_node(node)


def _name(node: fx.Node) -> str:
    """The user's name of a held tensor: its path in the module, or the variable that holds it."""
    source: Source = node._dynamo_source  # type: ignore[attr-defined]
    name = source.name
    if not source.guard_source.is_unspecialized_nn_module():
        name = re.sub(r"^[LG]\['([^']*)'\]", r"\1", name)
    return clean_path(name)


def _is_held(node: fx.Node, given: Tensor) -> bool:
    """Whether an input is a tensor that a module (or a closure, or the globals) holds, not one that a caller passes."""
    source = getattr(node, "_dynamo_source", None)
    # A number that a module holds comes as a tensor made for this call, where sizes are dynamic.
    if source is None or getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False):
        return False
    if source.guard_source.is_unspecialized_nn_module() or source.name.startswith("G["):
        return True
    while isinstance(source, ChainedSource):
        source = source.base
    # A variable that a function closes over may be a weight; so may, after a graph break, be any that a comprehension reads.
    return isinstance(source, LocalSource) and source.is_derefed_cell_contents and isinstance(given, torch.nn.Parameter)


def _fake_mode(sources: Sequence[fx.Node]) -> FakeTensorMode:
    for node in sources:
        fake = node.meta.get("example_value")
        if isinstance(fake, FakeTensor):
            return fake.fake_mode
    return FakeTensorMode()
