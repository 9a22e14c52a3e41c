"""From a graph that Dynamo captured to a :class:`~qcompile.passes.program.Program`, and back to what Inductor takes.

Dynamo's graph speaks torch functions and tensor methods. It is traced once more, before autograd and with Dynamo's own
fake tensors, so that the passes see the same aten operators as in an exported program.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch._dynamo.source import ChainedSource, ConstantSource, LocalSource
from torch._guards import Source
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qcompile.owned import is_owned
from qcompile.passes.held import HELD, INPUT
from qcompile.passes.program import Constant, Program, clean_path
from qcompile.retrace import retrace
from qcompile.weight_cache import WeightCache


@dataclass(frozen=True)
class Captured:
    """A program and what is needed to hand it on.

    Attributes:
        program: the program; ``Constant.index`` is the position among ``sources``.
        sources: Dynamo's placeholders, in order.
        weights: by position, the tensors that modules hold: the program's constants before the first pass.
    """

    program: Program
    sources: tuple[fx.Node, ...]
    weights: dict[int, Tensor]


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
            tensor = cache.skeleton(given)
            if tensor is not given:
                with mode:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=given.device)
            constants[i] = Constant(
                _name(node), tensor, is_parameter=isinstance(given, torch.nn.Parameter),
                receives_grad=grad and given.requires_grad, index=i, identity=cache.identity(given),
            )  # fmt: skip
        fakes.append(fake)
    module = retrace(gm, fakes, mode)
    placeholders = module.graph.find_nodes(op="placeholder")
    named = {placeholders[i].name: c for i, c in constants.items()}
    _mark_written(placeholders, constants)
    _mark_held(placeholders, example_inputs, constants)
    flows = grad and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)
    program = Program(module, named, mode, inference=not flows, memo=cache)
    return Captured(program, sources, {i: example_inputs[i] for i in constants})


def to_inductor(captured: Captured) -> tuple[fx.GraphModule, list[int]]:
    """The graph that Inductor takes, and which of Dynamo's inputs it still wants, in order."""
    program, graph = captured.program, captured.program.graph
    module = program.module
    kept: list[int] = []
    names: dict[str, ConstantSource] = {}
    for position, node in enumerate(list(graph.find_nodes(op="placeholder"))):
        constant = program.constants.get(node.name)
        if constant is not None and constant.index is None:
            name = f"qcompile_{position}_{node.name}"
            module.register_buffer(name, constant.tensor)
            names[name] = ConstantSource(name)
            with graph.inserting_before(program.first_call()):
                held = graph.get_attr(name)
            held.meta.update(node.meta)
            node.replace_all_uses_with(held)
            graph.erase_node(node)
            continue
        i = node.meta[INPUT]
        source = captured.sources[i]
        node.meta.update({k: v for k, v in source.meta.items() if k not in node.meta})
        if hasattr(source, "_dynamo_source"):
            node._dynamo_source = source._dynamo_source
        kept.append(i)
    for name, _ in (*module.named_buffers(), *module.named_parameters()):
        names.setdefault(name, ConstantSource(name))
    module._param_name_to_source = names  # type: ignore[assignment]
    program.recompile()
    return module, kept


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


def _mark_written(placeholders: Sequence[fx.Node], constants: dict[int, Constant]) -> None:
    from qcompile.passes.writes import is_written

    for i, constant in constants.items():
        constant.mutated = is_written(placeholders[i])


def _mark_held(placeholders: Sequence[fx.Node], example_inputs: Sequence[Any], constants: dict[int, Constant]) -> None:
    """Mark what is the same tensor in every call, and shares its memory with no other input."""
    memory = Counter(t.untyped_storage().data_ptr() for t in example_inputs if _has_memory(t))
    grad = torch.is_grad_enabled()
    for i, (placeholder, given) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if not _has_memory(given) or (grad and given.requires_grad) or memory[given.untyped_storage().data_ptr()] > 1:
            continue
        if is_owned(given) or (i in constants and constants[i].tensor is given):  # not one whose values were released
            placeholder.meta[HELD] = given


def _has_memory(given: object) -> TypeGuard[Tensor]:
    if not isinstance(given, Tensor) or type(given) not in (Tensor, torch.nn.Parameter):
        return False
    return given.layout == torch.strided and given.device.type == "cpu"
