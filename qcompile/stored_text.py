"""What a stored graph may say: every text in it that torch would resolve, evaluate or write into code is checked first.

Rebuilding a graph hands its texts to ``getattr``, to sympy's parser, and to the code that FX and ``torch.export`` generate
and execute. So each kind of text has a grammar here, and what does not fit it is refused.
"""

from __future__ import annotations

import ast
import functools
import json
import keyword
import re
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["NAMESPACES", "StoredTextError", "expression", "guard", "identifier", "path", "plain", "structure", "target"]

#: Operator libraries whose operators compute on tensors and do nothing else.
NAMESPACES = ("aten", "prims", "qcompile", "quantized_decomposed", "torchvision")

#: Operators of these libraries that read or write files.
_FORBIDDEN = frozenset({"from_file", "save", "load", "_save", "_load"})

#: Operators that take parts of the graph as arguments and do nothing else.
_HIGHER_ORDER = frozenset({
    "wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "while_loop", "scan", "map_impl", "associative_scan",
})  # fmt: skip

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_.:+\-/]*")
_PLAIN = re.compile(r"[^\"'`\\\x00-\x1f\x7f]*")
_SYMBOL = re.compile(r"[a-z]{1,4}[0-9]+")

_FUNCTIONS = frozenset({
    "Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "FloatTrueDiv", "FloorDiv", "FloorToInt",
    "Ge", "GreaterThan", "Gt", "Identity", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "Le", "LessThan", "Lt",
    "Max", "Min", "Mod", "ModularIndexing", "Mul", "Ne", "Not", "Or", "PythonMod", "RoundDecimal", "RoundToInt",
    "StrictGreaterThan", "StrictLessThan", "ToFloat", "TruncToFloat", "TruncToInt", "Unequality", "Where", "ceiling",
    "floor",
})  # fmt: skip
_POWERS = frozenset({"FloatPow", "Pow", "LShift", "PowByNatural", "RShift"})

_ASSUMPTIONS = frozenset({"positive", "integer", "nonnegative", "negative", "real", "finite", "zero", "nonzero"})

_GUARD_METHODS = frozenset({"size", "stride", "storage_offset", "dim", "numel"})

_OPERATIONS = (
    ast.Expression, ast.Load, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.UnaryOp, ast.USub,
    ast.UAdd, ast.Not, ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip

_LONGEST = 20_000


class StoredTextError(ValueError):
    """A text in a stored graph is not what may stand there; the message quotes it."""


def identifier(text: str) -> None:
    """A Python name that is no keyword: names of nodes become variables of generated code."""
    if not _IDENTIFIER.fullmatch(text) or keyword.iskeyword(text):
        raise StoredTextError(f"{_quote(text)} is not a name")


def path(text: str) -> None:
    """A parameter's name or a module's path."""
    if not _PATH.fullmatch(text):
        raise StoredTextError(f"{_quote(text)} is not a parameter's name: letters, digits and . _ - : + / are allowed")


def plain(text: str) -> None:
    """Text without quotes, backslashes and control characters."""
    if not _PLAIN.fullmatch(text):
        raise StoredTextError(f"{_quote(text)} has quotes, backslashes or control characters")


def target(text: str, namespaces: Iterable[str] = NAMESPACES) -> None:
    """An operator that computes on tensors, or arithmetic on sizes.

    Args:
        namespaces: operator libraries that are allowed.
    """
    parts = text.split(".")
    for part in parts:
        identifier(part)
    resolved: Any = None
    if parts[:2] == ["torch", "ops"] and len(parts) in (4, 5):
        space, name = parts[2], parts[3]
        higher = space == "higher_order" and name in _HIGHER_ORDER and len(parts) == 4
        if not higher and (space not in set(namespaces) or name in _FORBIDDEN or len(parts) != 5):
            raise StoredTextError(
                f"operator {_quote(text)} is not allowed; allowed are operators of {', '.join(sorted(namespaces))} that "
                f"touch no files, and the control flow {', '.join(sorted(_HIGHER_ORDER))}"
            )
        try:
            resolved = getattr(getattr(torch.ops, space), name)
            resolved = resolved if higher else getattr(resolved, parts[4])
        except (AttributeError, RuntimeError) as error:
            raise StoredTextError(
                f"operator {_quote(text)} is not registered here; import the package that defines it"
            ) from error
        kind = torch._ops.HigherOrderOperator if higher else torch._ops.OpOverload
        if not isinstance(resolved, kind):
            raise StoredTextError(f"{_quote(text)} is not an operator")
        return
    if text not in _size_functions():
        raise StoredTextError(f"{_quote(text)} is neither an operator nor arithmetic on sizes")


@functools.lru_cache(maxsize=4096)
def expression(text: str) -> None:
    """A size: arithmetic on integers and symbols such as ``s0``, with torch's functions of sizes."""
    _grammar(text, _size_node)


def guard(text: str) -> None:
    """A condition on inputs, such as ``L['x'].size()[1] >= 2``."""
    _grammar(text, _guard_node)


def structure(text: str, types: Iterable[str] | None = None) -> None:
    """A tree of containers, as ``torch.utils._pytree.treespec_dumps`` writes it.

    Args:
        types: names of container types that are allowed; None: all that are registered, but those whose reading imports
            modules that the text names.
    """
    import torch.utils._pytree as pytree

    registered = set(pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE) if types is None else set(types)
    registered -= {"collections.defaultdict"}
    try:
        version, tree = json.loads(text)
        _container(tree, registered)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, StoredTextError):
            raise
        raise StoredTextError(f"{_quote(text)} does not describe nested containers") from error
    if version != 1:
        raise StoredTextError(f"nested containers are described in version {version!r}, known is 1")


def _container(tree: Any, registered: set[str]) -> None:
    if not isinstance(tree, dict) or set(tree) != {"type", "context", "children_spec"}:
        raise StoredTextError(f"{_quote(str(tree))} does not describe a container")
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if not isinstance(children, list):
        raise StoredTextError(f"{_quote(str(children))} is not a list of containers")
    if kind is None:
        if context is not None or children:
            raise StoredTextError("a leaf has neither context nor children")
        return
    if kind not in registered:
        raise StoredTextError(f"containers of type {_quote(str(kind))} are not known here; import what defines them")
    if isinstance(context, str) and kind != "collections.namedtuple":
        context = json.loads(context)
    _keys(context)
    for child in children:
        _container(child, registered)


def _keys(context: Any) -> None:
    """Keys of a container: they are written into the code that checks inputs."""
    if isinstance(context, str):
        plain(context)
    elif isinstance(context, list):
        for item in context:
            _keys(item)
    elif isinstance(context, dict):
        for key, item in context.items():
            if key.startswith("__"):
                raise StoredTextError(f"{_quote(key)} may not stand in the description of a container")
            plain(key)
            _keys(item)
    elif context is not None and not isinstance(context, (bool, int, float)):
        raise StoredTextError(f"{context!r} may not stand in the description of a container")


def _grammar(text: str, allowed: Any) -> None:
    if len(text) > _LONGEST or not text.isascii():
        raise StoredTextError(f"{_quote(text)} is not arithmetic on sizes")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        _every(tree, allowed)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, StoredTextError):
            raise
        raise StoredTextError(f"{_quote(text)} is not arithmetic on sizes") from error


def _every(node: ast.AST, allowed: Any) -> None:
    stack = [node]
    while stack:
        current = stack.pop()
        children = allowed(current)
        if children is None:
            raise StoredTextError(f"{_quote(ast.unparse(current))} may not stand in arithmetic on sizes")
        stack += children


def _size_node(node: ast.AST) -> list[ast.AST] | None:
    """The children of a node that is allowed, else None."""
    if isinstance(node, _OPERATIONS):
        return list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Constant):
        small = isinstance(node.value, (bool, float)) or (isinstance(node.value, int) and abs(node.value) < 1 << 70)
        return [] if small else None
    if isinstance(node, ast.Name):
        return [] if _SYMBOL.fullmatch(node.id) or node.id in ("oo", "int_oo", "inf", "true", "false") else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return [node.left] if _small(node.right) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in ("Symbol", "Integer", "Rational", "Float"):
            return [] if _atom(node) else None
        if node.keywords:
            return None
        if node.func.id in _POWERS:
            return [node.args[0]] if len(node.args) == 2 and _small(node.args[1]) else None
        return list(node.args) if node.func.id in _FUNCTIONS else None
    return None


def _guard_node(node: ast.AST) -> list[ast.AST] | None:
    if isinstance(node, ast.Name) and node.id == "L":
        return []
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [] if _PLAIN.fullmatch(node.value) else None
    if isinstance(node, ast.Constant) and node.value is None:
        return []
    if isinstance(node, ast.Subscript):
        return [node.value, node.slice]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
        return [node.func.value, *node.args] if node.func.attr in _GUARD_METHODS else None
    if isinstance(node, (ast.Is, ast.IsNot)):
        return []
    return _size_node(node)


def _atom(node: ast.Call) -> bool:
    """A symbol or a number as sympy spells it: ``Symbol('s0', integer=True)``, ``Integer(2)``."""
    kind = node.func.id if isinstance(node.func, ast.Name) else ""
    values = [a.value if isinstance(a, ast.Constant) else _negative(a) for a in node.args]
    options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if len(options) != len(node.keywords):
        return False
    if kind == "Symbol":
        named = len(values) == 1 and isinstance(values[0], str) and _SYMBOL.fullmatch(values[0]) is not None
        return named and all(k in _ASSUMPTIONS and isinstance(v, bool) for k, v in options.items())
    if kind == "Float":
        number = (
            len(values) == 1 and isinstance(values[0], str) and re.fullmatch(r"-?[0-9.]{1,40}(e[+-]?[0-9]{1,3})?", values[0])
        )
        return bool(number) and set(options) <= {"precision"} and options.get("precision", 53) in range(1, 200)
    whole = all(type(v) is int and abs(v) < 1 << 70 for v in values)
    return whole and not options and len(values) == (2 if kind == "Rational" else 1)


def _negative(node: ast.AST) -> object:
    """The value of ``-3``, which Python parses as an operation."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value if type(node.operand.value) is int else None
    return None


def _small(node: ast.AST) -> bool:
    """An exponent with which no power takes long to compute."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer" and len(node.args) == 1:
        node = node.args[0]
    value = node.value if isinstance(node, ast.Constant) else _negative(node)
    return type(value) is int and -64 <= value <= 64


@functools.cache
def _size_functions() -> frozenset[str]:
    """Functions of sizes by the names under which torch stores them."""
    from torch._export.serde.serialize import _SYM_OPS

    names = {"_operator.getitem"}
    for function in _SYM_OPS:
        module = getattr(function, "__module__", "")
        if module in ("_operator", "math", "torch"):
            names.add(f"{module}.{function.__name__}")
    return frozenset(names)


def _quote(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
