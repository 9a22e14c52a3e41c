"""Between ``torch.export.ExportedProgram`` and :class:`~qcompile.passes.program.Program`, both ways."""

from __future__ import annotations

import copy
import re

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument

from qcompile.passes.program import Constant, Program
from qcompile.passes.writes import is_written

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def from_exported(ep: ExportedProgram) -> Program:
    """A program from a copy of an exported graph; tensors are shared, ``ep`` is never changed."""
    module = _copy(ep.graph_module)
    constants: dict[str, Constant] = {}
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    mutated = set(ep.graph_signature.buffers_to_mutate.values())
    names = _names_by_tensor(ep)
    for i, (node, spec) in enumerate(zip(placeholders, ep.graph_signature.input_specs, strict=True)):
        if spec.kind not in _HELD:
            continue
        tensor = _held_tensor(ep, spec)
        aliases = tuple(n for n in names.get(id(tensor), ()) if n != spec.target)
        constants[node.name] = Constant(
            str(spec.target), tensor, aliases, spec.kind == InputKind.PARAMETER,
            mutated=spec.target in mutated or is_written(node), fixed=True, index=i,
        )  # fmt: skip
    return Program(module, constants, fake_mode(module.graph))


def to_exported(program: Program, ep: ExportedProgram) -> ExportedProgram:
    """An exported program with the graph and constants of ``program``, made from ``ep``, whose calling it keeps."""
    state, extra = dict(ep.state_dict), dict(ep.constants)
    old = ep.graph_signature
    specs: list[InputSpec] = []
    used: set[str] = set()
    users = iter([s for s in old.input_specs if s.kind not in _HELD])
    for node in program.graph.nodes:
        if node.op != "placeholder":
            break
        constant = program.constants.get(node.name)
        if constant is None:
            specs.append(next(users))
        elif constant.index is not None:
            specs.append(old.input_specs[constant.index])
            used.add(str(specs[-1].target))
        else:
            target = re.sub(r"[^\w.]+", "_", constant.name)
            state[target] = constant.tensor
            used.add(target)
            specs.append(InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), target, persistent=True))
    kept = {s.target for s in specs if s.kind in _HELD}
    # Non-persistent buffers and constants that the graph still reads live outside the state; what it no longer reads goes.
    state = {k: v for k, v in state.items() if k in used}
    extra = {k: v for k, v in extra.items() if not isinstance(v, Tensor) or k in kept}
    module = fx.GraphModule(program.module, program.graph)
    module.meta.update(ep.graph_module.meta)
    signature = ExportGraphSignature(specs, _outputs(program, old.output_specs))
    return ep._update(module, signature, state_dict=state, constants=extra)


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which every input keeps its name; fx would give those that are called as a builtin (``input``) another."""
    copied = copy.deepcopy(module)
    for old, new in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        if old.op == "placeholder":
            new.name, new.target = old.name, old.target
    return copied


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that a graph's values belong to."""
    for node in graph.nodes:
        value = node.meta.get("val")
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, FakeTensor):
                return item.fake_mode
    return FakeTensorMode()


def _held_tensor(ep: ExportedProgram, spec: InputSpec) -> Tensor:
    target = str(spec.target)
    held = ep.state_dict.get(target) if target in ep.state_dict else ep.constants.get(target)
    if not isinstance(held, Tensor):
        raise ValueError(f"the exported program names {spec.kind.name.lower()} {target!r} but does not hold it")
    return held


def _names_by_tensor(ep: ExportedProgram) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in ep.state_dict.items():
        names.setdefault(id(tensor), []).append(name)
    return names


def _outputs(program: Program, specs: list[OutputSpec]) -> list[OutputSpec]:
    """The old output specs with the names of nodes that took others' places."""
    results = program.graph.output_node().args[0]
    renamed = []
    for spec, result in zip(specs, results, strict=True):  # type: ignore[arg-type]
        spec = copy.copy(spec)
        if isinstance(result, fx.Node) and hasattr(spec.arg, "name"):
            spec.arg = type(spec.arg)(name=result.name)  # type: ignore[call-arg]
        renamed.append(spec)
    return renamed
