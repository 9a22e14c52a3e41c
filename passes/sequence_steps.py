"""Which nodes may be steps of a sequence, and how each is written as one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.kernels.ops.sequence import LARGE, MOST_AXES, Kind
from qcompile.passes.program import is_tensor, normalized, shape_of, static_shape, value
from qcompile.passes.views import VIEWS

aten = torch.ops.aten
qc = torch.ops.qcompile

#: The operators that a sequence is made for.
LARGE_TARGETS = {getattr(qc, name).default: name for name in LARGE}

#: How many values small steps may have: they run in one thread, and Inductor's loops are better at more.
FEW = 1 << 14

#: Views, and what gives its input back where it lies as asked for.
_LOOKS = VIEWS | {aten.contiguous.default, aten.detach.default, aten.alias.default, aten.expand.default}
#: Views that come in several parts, which `getitem` takes.
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int}
_SPLITS |= {aten.tensor_split.sections}
_LOOKS -= {*_SPLITS, aten.view_as.default}


@dataclass(frozen=True)
class Place:
    """Where a value lies: in the memory of ``root``, from element ``offset`` on."""

    root: fx.Node
    offset: int
    kind: Kind


def _two(node: fx.Node) -> list[Any] | None:
    args = normalized(node)
    other = args["other"]
    if args.get("alpha", 1) != 1 or not (isinstance(other, (int, float)) or is_tensor(other)):
        return None
    return [args["self"], float(other) if isinstance(other, (int, float)) else other]


def _cat(node: fx.Node) -> list[Any] | None:
    args = normalized(node)
    # torch leaves out empty vectors
    fits = all(value(t).dim() == value(node).dim() for t in args["tensors"])
    return [list(args["tensors"]), args["dim"]] if fits else None


def _index_copy(node: fx.Node) -> list[Any] | None:
    args = normalized(node)
    fits = value(args["index"]).dtype in (torch.int32, torch.int64) and value(args["index"]).dim() == 1
    fits = fits and value(args["source"]).dim() == value(args["self"]).dim()
    return [args["self"], args["dim"], args["index"], args["source"]] if fits else None


def _range(node: fx.Node) -> list[Any] | None:
    args = normalized(node)
    return [args["end"]] if isinstance(args["end"], int) and args.get("dtype") in (None, torch.int64) else None


def _norm(node: fx.Node) -> list[Any] | None:
    args = normalized(node)
    weight, bias, eps = args["weight"], args.get("bias"), args["eps"]
    if weight is None or eps is None or list(args["normalized_shape"]) != [shape_of(args["input"])[-1]]:
        return None
    if bias is not None and value(bias).dtype != value(weight).dtype:
        return None
    if not all(t is None or value(t).is_contiguous() for t in (weight, bias)):
        return None
    return [args["input"], weight, eps] if node.target is aten.rms_norm.default else [args["input"], weight, bias, eps]


#: The name of a step, and its arguments; None where this call is none.
_SMALL: dict[object, tuple[str, Callable[[fx.Node], list[Any] | None]]] = {
    aten.mul.Tensor: ("mul", _two),
    aten.add.Tensor: ("add", _two),
    aten.sub.Tensor: ("sub", _two),
    aten.neg.default: ("neg", lambda node: [node.args[0]]),
    aten.cat.default: ("cat", _cat),
    aten.clone.default: ("clone", lambda node: [node.args[0]]),
    aten.index_copy_.default: ("index_copy_", _index_copy),
    aten.copy_.default: ("copy_", lambda node: list(node.args[:2])),
    aten.add_.Tensor: ("add_", _two),
    aten.arange.default: ("arange", _range),
    aten.rms_norm.default: ("rms_norm", _norm),
    aten.layer_norm.default: ("layer_norm", _norm),
}
NORMS = (aten.rms_norm.default, aten.layer_norm.default)
WRITES = (aten.index_copy_.default, aten.copy_.default, aten.add_.Tensor)
#: Steps on vectors of int64: positions in a cache, and how far it is filled.
_COUNTS = (aten.add.Tensor, aten.add_.Tensor, aten.arange.default)


def is_large(node: fx.Node) -> bool:
    """Whether a node is one of the CPU's operators on tensors of known sizes."""
    return node.target in LARGE_TARGETS and _known(node)


def is_count(node: fx.Node) -> bool:
    """Whether a node is arithmetic on a few int64 that may be a step."""
    if node.target not in _COUNTS or not _known(node) or value(node).dtype != torch.int64:
        return False
    arguments = _SMALL[node.target][1](node)
    size = value(node).numel()
    return (
        arguments is not None
        and 0 < size <= FEW
        and all(not isinstance(a, float) or abs(a) < 1 << 53 for a in arguments)
        and all(t.dtype == torch.int64 and t.dim() < 2 and t.is_contiguous() and t.numel() in (1, size)
                for t in (value(node), *map(value, node.all_input_nodes)))
    )  # fmt: skip


def is_small(node: fx.Node) -> bool:
    """Whether a node is glue that may be a step: few values, of one floating-point dtype; or a norm of any size."""
    if node.target not in _SMALL or node.target in (aten.add_.Tensor, aten.arange.default) or not _known(node):
        return False
    if node.target not in (*NORMS, aten.index_copy_.default) and value(node).numel() > FEW:
        return False
    arguments = _SMALL[node.target][1](node)
    if arguments is None or value(node).dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if node.target is aten.clone.default and node.kwargs.get("memory_format") not in (None, torch.contiguous_format):
        return False
    if Kind.of(value(node)).span() != value(node).numel() or (node.target in NORMS and not value(node).is_contiguous()):
        return False
    read: list[Any] = node.all_input_nodes
    if node.target is aten.index_copy_.default:
        read = [node.args[0], node.args[3]]
        if value(read[1]).numel() > FEW:
            return False
    elif node.target in NORMS:
        read = [arguments[0]]
    return all(value(n).dtype == value(node).dtype for n in read)


def _known(node: fx.Node) -> bool:
    own = value(node)
    tensors = [*(own if isinstance(own, (list, tuple)) else [own]), *(value(n) for n in node.all_input_nodes)]
    return all(
        isinstance(t, Tensor)
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and t.dim() <= MOST_AXES
        and all(isinstance(n, int) for n in (*t.shape, *t.stride()))
        for t in tensors
        if not isinstance(t, (list, tuple))
    )


def is_split(node: object) -> bool:
    """Whether a node shows parts of its input."""
    return isinstance(node, fx.Node) and node.target in _SPLITS and node.all_input_nodes == [node.args[0]]


def looked_at(node: fx.Node) -> fx.Node | None:
    """What a node only shows in another way, or copies to be able to; None where it does anything else."""
    if node.op != "call_function" or not node.args or not is_tensor(node):
        return None
    source: Any = node.args[0]
    if node.target is operator.getitem and is_split(source):
        source = source.args[0]
    elif node.target not in _LOOKS or node.all_input_nodes != [source]:
        return None
    known = isinstance(source, fx.Node) and static_shape(source) is not None and static_shape(node) is not None
    return source if known and value(source).device.type == "cpu" and value(source).layout == torch.strided else None


def seen(node: fx.Node, base: Place) -> Place | None:
    """Where the value of a look lies, given where that lies which it looks at; None where it must be copied."""
    shadow = torch.empty_strided(base.kind.sizes, base.kind.strides, dtype=base.kind.dtype, device="meta")
    split: Any = node.args[0] if node.target is operator.getitem else node
    try:
        shown = split.target(shadow, *split.args[1:], **split.kwargs)
    except RuntimeError:
        return None
    shown = shown[node.args[1]] if split is not node else shown
    if shown.untyped_storage()._cdata != shadow.untyped_storage()._cdata or shown.dim() > MOST_AXES:
        return None
    return Place(base.root, base.offset + shown.storage_offset(), Kind.of(shown))


def written(node: fx.Node) -> tuple[str, list[Any]]:
    """The name of a step and its arguments, nodes among them; a look that is a step copies."""
    if node.target in LARGE_TARGETS:
        return LARGE_TARGETS[node.target], list(normalized(node).values())
    if looked_at(node) is not None:
        return "clone", [node.args[0]]
    name, arguments = _SMALL[node.target]
    return name, arguments(node) or []


def parts_of(node: fx.Node) -> list[Any]:
    """The nodes of the values that a step gives, in order; None for one that nobody reads."""
    own = value(node)
    if not isinstance(own, (list, tuple)):
        return [node]
    parts: list[Any] = [None] * len(own)
    for user in node.users:
        parts[user.args[1]] = user  # type: ignore[index]
    return parts
