"""What every way of capturing gives, and how it goes on to Inductor after the passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.passes.held import HELD, INPUT
from qcompile.passes.program import Constant, Program
from qcompile.passes.writes import is_written
from qcompile.weight_cache import WeightCache


@dataclass(frozen=True)
class Captured:
    """A program and what is needed to hand it on.

    Attributes:
        program: the program; ``Constant.index`` is the position among ``given``.
        given: what flows in, by the position of its placeholder: arguments and what the captured code reads besides.
        weights: by position, the tensors that modules hold: the program's constants before the first pass.
        names: by position, the user's names of those.
        sources: Dynamo's placeholders, where it captured.
    """

    program: Program
    given: tuple[Any, ...]
    weights: dict[int, Tensor]
    names: dict[int, str]
    sources: tuple[fx.Node, ...] = ()


def fake_of_weight(weight: Tensor, cache: WeightCache, mode: FakeTensorMode, fake: Any) -> tuple[Tensor, Any]:
    """What stands for a weight in a program and in its trace: of one that was released, a tensor of what it was like."""
    tensor = cache.skeleton(weight)
    if tensor is not weight:
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=weight.device)
    return tensor, fake


def assemble(
    module: fx.GraphModule,
    given: Sequence[Any],
    constants: dict[int, Constant],
    mode: FakeTensorMode,
    cache: WeightCache,
    *,
    steady: Collection[int],
    sources: Sequence[fx.Node] = (),
) -> Captured:
    """The program of a traced graph.

    Args:
        module: the graph; its placeholders, in order, are those of ``given``.
        constants: by position.
        steady: positions of tensors that are the same ones in every call.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    for i, constant in constants.items():
        constant.mutated = is_written(placeholders[i])
    grad = torch.is_grad_enabled()
    released = {i for i, c in constants.items() if c.tensor is not given[i]}
    memory = Counter(t.untyped_storage().data_ptr() for t in given if _has_memory(t))
    for i in set(steady) - released:
        t = given[i]
        if _has_memory(t) and not (grad and t.requires_grad) and memory[t.untyped_storage().data_ptr()] == 1:
            placeholders[i].meta[HELD] = t
    flows = grad and any(isinstance(t, Tensor) and t.requires_grad for t in given)
    names = {i: c.name for i, c in constants.items()}
    program = Program(module, {placeholders[i].name: c for i, c in constants.items()}, mode, inference=not flows, memo=cache)
    return Captured(program, tuple(given), {i: given[i] for i in constants}, names, tuple(sources))


def to_inductor(captured: Captured) -> tuple[fx.GraphModule, list[int]]:
    """The graph that Inductor takes, and which of the inputs it still wants, in order."""
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
        if captured.sources:
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


def _has_memory(given: object) -> TypeGuard[Tensor]:
    if not isinstance(given, Tensor) or type(given) not in (Tensor, torch.nn.Parameter):
        return False
    return given.layout == torch.strided and given.device.type == "cpu"
