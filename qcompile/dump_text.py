"""A program as text that people read: the user's names, one line an operator, quantized weights by their scheme."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.passes.program import Constant, Program, module_path, normalized
from qcompile.report_text import size

#: What the names of the parts of a quantized weight end with: codes and scales, or what a kernel packed.
_PART = re.compile(r"_(data|scale|zero|packed_\d+)(_\d+)?$")

#: Arguments that say nothing about the computation.
_UNSAID = ("cudnn_enable", "cudnn_enabled")


@dataclass(frozen=True)
class Item:
    """One line of a program.

    Attributes:
        key: the same for the same thing in two states of a program.
        section: ``inputs``, ``constants``, ``operators``.
        where: path of the module that it belongs to.
        block: what it is shown with: the repeated layer (``"layers.3"``); outside of layers how many came before (``"1"``),
            nothing for constants.
        name: of the value, with ``%`` before it; the user's name for a constant.
        op: the operator; empty for inputs and constants.
        args: its arguments.
        type: dtype and shape of the value.
    """

    key: str
    section: str
    where: str
    block: str
    name: str
    op: str
    args: str
    type: str

    @property
    def text(self) -> str:
        """The line."""
        if self.section != "operators":
            return f"{self.name}: {self.type}"
        return f"{self.name} = {self.op}({self.args}) → {self.type}" if self.name else f"{self.op} {self.args}"


@dataclass(frozen=True)
class Snapshot:
    """A program as it stood at one moment.

    Attributes:
        items: all lines in the order of the graph.
        bytes: bytes of all constants.
    """

    items: tuple[Item, ...]
    bytes: int

    @staticmethod
    def of(program: Program) -> Snapshot:
        """The state of ``program`` now."""
        items = (*_inputs(program), *_constants(program), *_operators(program))
        held = {(c.tensor.data_ptr(), c.tensor.shape, c.tensor.stride()): c.tensor for c in program.constants.values()}
        return Snapshot(items, sum(t.numel() * t.element_size() for t in held.values()))

    def lines(self) -> list[str]:
        """The whole program as lines of text."""
        text: list[str] = []
        section = where = None
        for item in self.items:
            if item.section != section:
                text += ["", f"{item.section}:"]
                section, where = item.section, None
            if item.section == "operators" and item.where != where:
                text.append(f"  # {item.where or '(the model itself)'}")
                where = item.where
            text.append("    " + item.text)
        return [*text[1:], "", f"constants take {size(self.bytes)}"]


def block_of(path: str) -> str:
    """The outermost repeated layer of a path: ``model.layers.3`` of ``model.layers.3.mlp.up``, or nothing."""
    match = re.match(r"(.*?\.|)\d+(?=\.|$)", path)
    return match.group() if match else ""


def stem(name: str) -> str:
    """The weight's name from that of one of its parts; siblings that were stacked are written in braces."""
    names = [re.sub(_PART, "", part) for part in re.sub(_PART, "", name).split("+")]
    return names[0] if len(names) == 1 else braces(names)


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts ``layers.10`` behind ``layers.9``."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name))


def braces(names: list[str]) -> str:
    """``a.{q,k}.weight`` for ``a.q.weight`` and ``a.k.weight``."""
    split = [n.split(".") for n in names]
    start = 0
    while all(len(s) > start + 1 for s in split) and len({s[start] for s in split}) == 1:
        start += 1
    end = 0
    while all(len(s) > start + end + 1 for s in split) and len({s[-1 - end] for s in split}) == 1:
        end += 1
    middle = ",".join(".".join(s[start : len(s) - end]) for s in split)
    return ".".join([*split[0][:start], f"{{{middle}}}", *split[0][len(split[0]) - end :]])


def type_of(value: object) -> str:
    """``float32[2, s0, 64]`` for a tensor; what there is otherwise."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_of(v) for v in value)})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(value).__name__.removeprefix('Sym').lower()} {value}"
    return "nothing" if value is None else f"{type(value).__name__} {value}"


def _inputs(program: Program) -> Iterator[Item]:
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in program.constants:
            yield Item(node.name, "inputs", "", "", f"%{node.name}", "", "", type_of(node.meta.get("val")))


def _constants(program: Program) -> Iterator[Item]:
    parts: dict[tuple[str, str], list[tuple[str, Constant]]] = {}
    for node in program.graph.nodes:
        constant = program.constants.get(node.name) if node.op == "placeholder" else None
        if constant is not None:
            match = _PART.search(constant.name)
            again = (match.group(2) or "") if match else ""
            parts.setdefault((stem(constant.name), again), []).append((match.group(1) if match else "", constant))
    for (name, again), held in sorted(parts.items(), key=lambda entry: natural(entry[0][0] + entry[0][1])):
        bytes_ = size(sum(c.tensor.numel() * c.tensor.element_size() for _, c in held))
        kind = ", ".join((f"{what} " if what else "") + type_of(c.tensor) for what, c in held)
        also = held[0][1].aliases if not held[0][0] else ()
        title = name + (f" (also {', '.join(also)})" if also else "")
        path = name.rpartition(".")[0]
        yield Item(f"constant {name}{again}", "constants", path, block_of(path), title, "", "", f"{kind}, {bytes_}")


def _operators(program: Program) -> Iterator[Item]:
    blocks: set[str] = set()
    where = ""
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        real = module_path(node)
        read = [c for n in node.all_input_nodes if (c := program.constant(n)) is not None]
        # A node that a pass put before everything else belongs to the weight that it decodes.
        where = real or (stem(read[0].name).rpartition(".")[0] if read and not node.meta.get("nn_module_stack") else where)
        block = block_of(where)
        if block and real:
            blocks.add(block)
        name = "" if node.op == "output" else f"%{node.name}"
        op, args = _call(program, node)
        shown = "" if node.op == "output" else where
        yield Item(node.name, "operators", shown, block or str(len(blocks)), name, op, args, type_of(node.meta.get("val")))


def _call(program: Program, node: fx.Node) -> tuple[str, str]:
    if node.op == "output":
        results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
        return "return", ", ".join(_value(program, r) for r in results)
    if node.target is operator.getitem:
        return "part", f"{_value(program, node.args[0])}, {node.args[1]}"
    if not isinstance(node.target, torch._ops.OpOverload):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        given = [_value(program, a) for a in node.args] + [f"{k}={_value(program, v)}" for k, v in node.kwargs.items()]
        return str(name), ", ".join(given)
    space, _, name = node.target._schema.name.partition("::")
    return (name if space == "aten" else f"{space}.{name}"), ", ".join(_arguments(program, node))


def _arguments(program: Program, node: fx.Node) -> Iterator[str]:
    """The arguments that say something: no defaults, the parts of a quantized weight as one."""
    given = normalized(node)
    defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
    weights = {k: c for k, v in given.items() if (c := program.constant(v)) is not None and _PART.search(c.name)}
    written: set[str] = set()
    own = node.target._schema.name.startswith("qcompile::")  # type: ignore[union-attr]
    scheme = given.get("scheme")
    for position, (name, value) in enumerate(given.items()):
        if name in weights:
            weight = stem(weights[name].name)
            if weight not in written:
                written.add(weight)
                packed = "packed_" in weights[name].name
                yield f"weight={weight}" + (f" as {scheme}" if scheme else " packed" if packed else "")
            continue
        if value is None or (name in defaults and value == defaults[name] and not isinstance(value, fx.Node)):
            continue
        if name in _UNSAID or (weights and name in ("scheme", "shape", "dtype")):
            continue
        text = _value(program, value)
        named = program.constant(value) is not None and name != "self"
        if named or name in defaults or (own and position):
            text = f"{name}={text}"
        yield text


def _value(program: Program, value: Any) -> str:
    if isinstance(value, fx.Node):
        constant = program.constant(value)
        return f"%{value.name}" if constant is None else stem(constant.name)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_value(program, v) for v in value)}]"
    plain = isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format))
    return str(value).removeprefix("torch.") if plain else repr(value)


def changes(before: Iterable[Item], after: Iterable[Item]) -> tuple[int, int, int]:
    """How many lines went, came, and changed."""
    old, new = ({(i.section, i.key): i.text for i in items} for items in (before, after))
    changed = sum(old[k] != new[k] for k in old.keys() & new.keys())
    return len(old.keys() - new.keys()), len(new.keys() - old.keys()), changed
