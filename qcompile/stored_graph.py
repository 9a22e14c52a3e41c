"""The graph of an exported program as JSON, and back, with everything in it checked before torch sees it.

The form is the one of ``torch.export``'s own schema without tensors. Source lines and stack traces are left out: they name
files of the machine that exported.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import logging
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._export.serde import schema
from torch._export.serde.serialize import (
    ExportedProgramDeserializer,
    ExportedProgramSerializer,
    SerializeError,
    _dict_to_dataclass,
    _to_json_bytes,
)
from torch._export.serde.union import _Union
from torch.export import ExportedProgram

from qcompile import stored_text
from qcompile.stored_text import StoredTextError

__all__ = ["check", "decode", "encode"]

log = logging.getLogger("qcompile.serialization")

#: What is kept of a node's metadata.
_METADATA = ("nn_module_stack", "torch_fn", "custom")

Rule = Callable[[str], None]


def encode(program: ExportedProgram) -> dict[str, Any]:
    """The graph of ``program`` as plain values.

    Raises:
        ValueError: the graph holds what cannot be stored safely; the message says what.
    """
    try:
        stored = ExportedProgramSerializer().serialize(
            program, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
        )
    except (SerializeError, AssertionError, TypeError) as error:
        raise ValueError(f"this program cannot be stored: {_last_line(error)}") from error
    document = json.loads(_to_json_bytes(stored.exported_program))
    _prune(document["graph_module"]["graph"])
    kept = []
    for guard in document.get("guards_code", []):
        try:
            stored_text.guard(guard)
            kept.append(guard)
        except StoredTextError:
            log.warning("a condition on inputs is not stored, and will not be checked after loading: %s", guard)
    document["guards_code"] = kept
    try:
        check(document)
    except ValueError as error:
        raise ValueError(f"this program cannot be stored: {error}") from error
    return typing.cast(dict[str, Any], document)


def decode(
    document: Mapping[str, Any],
    state: dict[str, Tensor],
    constants: dict[str, Tensor],
    examples: tuple[tuple[Any, ...], dict[str, Any]] | None,
) -> ExportedProgram:
    """The program of a graph that :func:`encode` wrote, with these tensors.

    Raises:
        ValueError: the graph is malformed, holds what is not allowed, or does not fit this version of torch.
    """
    check(document)
    try:
        made = _dict_to_dataclass(schema.ExportedProgram, document)
        return ExportedProgramDeserializer().deserialize(made, state, constants, examples)
    except Exception as error:
        raise ValueError(f"the stored graph cannot be rebuilt: {_last_line(error)}") from error


def check(document: object, namespaces: Sequence[str] = stored_text.NAMESPACES) -> None:
    """Raise ValueError unless ``document`` has the schema's form and every text in it is of its kind."""
    rules = _rules(namespaces)
    try:
        _conform(schema.ExportedProgram, document, "program", rules, "")
    except RecursionError as error:
        raise ValueError("the stored graph is nested too deeply") from error


def _rules(namespaces: Sequence[str]) -> dict[str, Rule]:
    """What each text must be, by ``Class.field``; a text without a rule is refused."""
    identifier, path, plain = stored_text.identifier, stored_text.path, stored_text.plain

    def optional(text: str) -> None:
        if text:
            identifier(text)

    def operator(text: str) -> None:
        stored_text.target(text, namespaces)

    def symbol(text: str) -> None:
        stored_text.expression(text)

    def never(text: str) -> None:
        raise StoredTextError(f"objects of TorchScript classes cannot be stored, found {text[:80]!r}")

    rules: dict[str, Rule] = {
        "ExportedProgram.opset_version": identifier,
        "ExportedProgram.range_constraints": symbol,
        "ExportedProgram.verifiers": path,
        "ExportedProgram.torch_version": path,
        "ExportedProgram.guards_code": stored_text.guard,
        "GraphModule.metadata": _text,
        "GraphModule.treespec_namedtuple_fields": path,
        "Graph.custom_obj_values": never,
        "Argument.as_operator": operator,
        "Argument.as_string": plain,
        "Argument.as_strings": plain,
        "Argument.as_string_to_argument": identifier,
        "Device.type": identifier,
        "CustomObjArgument.name": never,
        "CustomObjArgument.class_fqn": never,
        "Node.target": operator,
        "Node.name": optional,
        "Node.metadata": _text,
        "NamedArgument.name": optional,
        "SymExpr.expr_str": stored_text.expression,
        "InputToCustomObjSpec.custom_obj_name": never,
        "InputToConstantInputSpec.name": identifier,
        "ConstantValue.as_string": plain,
        "ModuleCallEntry.fqn": path,
        "ModuleCallSignature.in_spec": stored_text.structure,
        "ModuleCallSignature.out_spec": stored_text.structure,
        "ModuleCallSignature.forward_arg_names": identifier,
        "NamedTupleDef.field_names": identifier,
        # Arguments of operators are values, written as literals: any text will do.
        "Node.inputs Argument.as_string": _text,
        "Node.inputs Argument.as_strings": _text,
    }
    for values in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
        rules[f"Graph.{values}"] = identifier
    for kind in ("TensorArgument", "TokenArgument", "GraphArgument"):
        rules[f"{kind}.name"] = identifier
    for kind in ("SymIntArgument", "SymBoolArgument", "SymFloatArgument"):
        rules[f"{kind}.as_name"] = identifier
    for kind, field in (
        ("InputToParameterSpec", "parameter_name"), ("InputToBufferSpec", "buffer_name"),
        ("InputToTensorConstantSpec", "tensor_constant_name"), ("BufferMutationSpec", "buffer_name"),
        ("GradientToParameterSpec", "parameter_name"), ("ParameterMutationSpec", "parameter_name"),
        ("GradientToUserInputSpec", "user_input_name"), ("UserInputMutationSpec", "user_input_name"),
    ):  # fmt: skip
        rules[f"{kind}.{field}"] = path
    return rules


def _text(text: str) -> None:
    """Text that nothing evaluates; only what no terminal should be sent is refused."""
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
        raise StoredTextError(f"{text[:80]!r} has control characters")


def _conform(hint: Any, value: object, at: str, rules: Mapping[str, Rule], context: str) -> None:
    """Raise unless ``value`` has the form that ``hint`` says.

    Args:
        at: where in the document, for messages.
        context: what is inside of; some texts may be more there.
    """
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (p for p in parameters if p is not type(None))
        if value is not None:
            _conform(hint, value, at, rules, context)
    elif origin is list:
        for i, item in enumerate(_of(value, list, at)):
            _conform(parameters[0], item, f"{at}[{i}]" if i < 1000 or i % 1000 == 0 else at, rules, context)
    elif origin is dict:
        for key, item in _of(value, dict, at).items():
            _apply(key, at, rules, context)
            _conform(parameters[1], item, at, rules, context)
    elif dataclasses.is_dataclass(hint):
        _conform_fields(hint, _of(value, dict, at), at, rules, context)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        if type(value) is not int or value not in {int(v.value) for v in hint}:
            raise ValueError(f"{at}: {value!r} is no {hint.__name__}")
    elif hint is str:
        _apply(_of(value, str, at), at, rules, context)
    elif hint is float:
        if value not in ("Infinity", "-Infinity", "NaN") and type(value) not in (int, float):
            raise ValueError(f"{at}: expected a number, found {value!r}")
    elif hint in (int, bool):
        _of(value, hint, at)
    else:
        raise ValueError(f"{at}: nothing of type {hint!r} can be stored")


def _conform_fields(hint: Any, value: dict[str, Any], at: str, rules: Mapping[str, Rule], context: str) -> None:
    hints, required = _fields(hint)
    unknown = set(value) - set(hints)
    if unknown:
        raise ValueError(f"{at}: {hint.__name__} has no {', '.join(map(repr, sorted(unknown)))}")
    if issubclass(hint, _Union):
        if len(value) != 1:
            raise ValueError(f"{at}: {hint.__name__} is one of several things, found {sorted(value)}")
    else:
        missing = required - set(value)
        if missing:
            raise ValueError(f"{at}: {hint.__name__} lacks {', '.join(sorted(missing))}")
    for key, item in value.items():
        inner = "Node.inputs" if (hint.__name__, key) == ("Node", "inputs") else context
        if (hint.__name__, key) == ("GraphArgument", "graph"):
            inner = ""
        _conform(hints[key], item, f"{hint.__name__}.{key}", rules, inner)


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of the fields of a schema class, and the names of those without a default."""
    hints = {k: h for k, h in typing.get_type_hints(kind).items() if k != "_type"}
    absent = dataclasses.MISSING
    needed = (f.name for f in dataclasses.fields(kind) if f.default is absent and f.default_factory is absent)
    return hints, frozenset(needed)


def _apply(text: object, at: str, rules: Mapping[str, Rule], context: str) -> None:
    place = re.sub(r"(\[\d+\])+$", "", at)
    rule = rules.get(f"{context} {place}") or rules.get(place)
    if rule is None or not isinstance(text, str):
        raise ValueError(f"{at}: unexpected text {str(text)[:80]!r}")
    try:
        rule(text)
    except StoredTextError as error:
        raise StoredTextError(f"{at}: {error}") from error


def _of(value: object, kind: type, at: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{at}: expected {kind.__name__}, found {type(value).__name__} {str(value)[:80]!r}")
    return value


def _prune(graph: dict[str, Any]) -> None:
    """Drop what names files of this machine."""
    for node in graph["nodes"]:
        node["metadata"] = {k: v for k, v in node["metadata"].items() if k in _METADATA}
        for given in node["inputs"]:
            inner = given["arg"].get("as_graph")
            if inner is not None:
                _prune(inner["graph"])


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"
