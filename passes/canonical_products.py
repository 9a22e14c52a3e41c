"""Matrix products in all their spellings, as one linear or one batched linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.passes.contraction import Contraction, parse_einsum
from qcompile.passes.program import is_tensor, normalized, shape_of, static_shape, value
from qcompile.passes.shapes import same_size
from qcompile.passes.sites import Sites
from qcompile.passes.views import repeated, trace

aten = torch.ops.aten


def product(sites: Sites, node: fx.Node, x: object, w: object, labels: tuple[str, str, str], op: str) -> fx.Node | None:
    """A product of two operands, either of which may be the constant; returns what takes the place of ``node``."""
    for activation, operand, order in ((x, w, (0, 1)), (w, x, (1, 0))):
        source = trace(sites.program, operand)
        if source is None or not is_tensor(activation) or trace(sites.program, activation) is not None:
            continue
        contraction = Contraction(labels[order[0]], labels[order[1]], labels[2])
        sizes = static_shape(operand)
        if contraction.kind is None or sizes is None or not _broadcast_free(contraction, activation, sizes):
            name = sites.program.constants[source.node.name].name
            sites.leave(op, node, f"a product of the form {','.join(labels[:2])}->{labels[2]} is not a linear", name)
            return None
        weight = sites.weight(source, contraction.arrange, contraction)
        with sites.program.graph.inserting_before(node):
            activation = sites.cast(activation, node)  # type: ignore[arg-type]
            operand = sites.cast(weight, node)
            result = contraction.emit(sites.program, node, activation, operand, sizes)
        _record(sites, contraction.kind, result, weight)
        return result
    sites.leave_operands(op, node, w, x)
    return None


def _record(sites: Sites, kind: str, result: fx.Node, weight: fx.Node) -> None:
    """Find the linear or bmm that was just emitted on the way to ``result``, and record it as a site."""
    current = result
    while current.target not in (aten.linear.default, aten.bmm.default):
        current = current.args[0]  # type: ignore[assignment]
    sites.site(kind, current, weight, current.args[1])  # type: ignore[arg-type]


def _broadcast_free(contraction: Contraction, x: object, sizes: tuple[int, ...]) -> bool:
    """Whether labels that both operands share have the same size (einsum and matmul also allow 1 against n)."""
    for label, size in zip(contraction.weight, sizes, strict=True):
        if label in contraction.x and not same_size(shape_of(x)[contraction.x.index(label)], size):  # type: ignore[arg-type]
            return False
    return True


def linear(sites: Sites, node: fx.Node) -> None:
    """``F.linear`` with a constant weight."""
    args = normalized(node)
    source, other = trace(sites.program, args["weight"]), trace(sites.program, args["input"])
    if source is None or (other is not None and sites.program.constants[other.node.name].is_parameter):
        sites.leave_operands("linear", node, args["weight"], args["input"])
        return
    weight = sites.weight(source)
    with sites.program.graph.inserting_before(node):
        x, operand = sites.cast(args["input"], node), sites.cast(weight, node)
        bias = None if args["bias"] is None else sites.cast(args["bias"], node)
        new = sites.program.call(aten.linear.default, x, operand, bias, like=node)
    sites.site("linear", new, weight, operand)
    sites.replace(node, new)


def matmul(sites: Sites, node: fx.Node) -> None:
    """``matmul``, ``mm``, ``bmm`` and ``mv`` with one constant operand, on either side."""
    args = normalized(node)
    x, w = args["self"], args.get("other", args.get("mat2", args.get("vec")))
    if _broadcast(sites, node, x, w):
        return
    labels = _matmul_labels(value(x).dim(), value(w).dim())
    result = product(sites, node, x, w, labels, "matmul")
    if result is not None:
        sites.replace(node, result)


def _broadcast(sites: Sites, node: fx.Node, x: object, w: object) -> bool:
    """A batched product that repeats a constant by ``expand``, as decomposed graphs do; the constant is taken unrepeated."""
    held = repeated(sites.program, w) or repeated(sites.program, x)
    if held is None or value(x).dim() != 3 or value(w).dim() != 3:
        return False
    left = repeated(sites.program, w) is None
    other = w if left else x
    stack = "A" * (value(held.node).dim() - 2)
    if not is_tensor(other) or trace(sites.program, other) is not None:
        return False
    with sites.program.graph.inserting_before(node):
        batch = ("B" if held.times is not None else "") + (stack or "A")
        if held.times is not None:
            sizes = [held.times, shape_of(held.node)[0]]
            other = sites.program.call(aten.unflatten.int, other, 0, sizes, like=node)
    own, rest = (stack + "mk", batch + "kn") if left else (stack + "kn", batch + "mk")
    labels = (own, rest, batch + "mn") if left else (rest, own, batch + "mn")
    first, second = (held.node, other) if left else (other, held.node)
    result = product(sites, node, first, second, labels, "matmul")
    if result is None:
        return True
    if held.times is not None:
        with sites.program.graph.inserting_before(node):
            result = sites.program.call(aten.flatten.using_ints, result, 0, 1, like=node)
    sites.replace(node, result)
    return True


def _matmul_labels(left: int, right: int) -> tuple[str, str, str]:
    """The labels of ``torch.matmul`` for operands of these ranks."""
    batch = "ABCDEFGH"
    x = "k" if left == 1 else batch[8 - (left - 2) :] * (left > 2) + "mk"
    w = "k" if right == 1 else batch[8 - (right - 2) :] * (right > 2) + "kn"
    longest = max(x[:-2], w[:-2], key=len)
    return x, w, longest + ("m" if left > 1 else "") + ("n" if right > 1 else "")


def addmm(sites: Sites, node: fx.Node) -> None:
    """``addmm`` and ``baddbmm``: a product and something added to it."""
    args = normalized(node)
    x, w = args.get("mat1", args.get("batch1")), args.get("mat2", args.get("batch2"))
    labels = ("Amk", "Akn", "Amn") if value(x).dim() == 3 else ("mk", "kn", "mn")
    result = product(sites, node, x, w, labels, "matmul")
    if result is None:
        return
    with sites.program.graph.inserting_before(node):
        if args["alpha"] != 1:
            result = sites.program.call(aten.mul.Scalar, result, args["alpha"], like=node)
        bias = args["self"]
        whole = args["alpha"] == 1 and args["beta"] == 1 and static_shape(bias) == (shape_of(node)[-1],)
        if whole and result.target is aten.linear.default:
            result.args = (result.args[0], result.args[1], sites.cast(bias, node))
        elif args["beta"] != 0:
            result = sites.program.call(aten.add.Tensor, result, bias, alpha=args["beta"], like=node)
    sites.replace(node, result)


def einsum(sites: Sites, node: fx.Node) -> None:
    """``einsum`` of an activation and a constant."""
    args = normalized(node)
    operands = args["tensors"]
    labels = parse_einsum(args["equation"], [value(t).dim() for t in operands])
    if labels is None:
        _left_einsum(sites, node, operands)
        return
    result = product(sites, node, operands[0], operands[1], labels, "einsum")
    if result is not None:
        sites.replace(node, result)


def _left_einsum(sites: Sites, node: fx.Node, operands: list[fx.Node]) -> None:
    """Record an einsum that is not a product of two."""
    weights = [sites.program.constants[s.node.name].name for s in (trace(sites.program, o) for o in operands) if s]
    if weights:
        sites.leave("einsum", node, f"an einsum of {len(operands)} operands", weights[0])
    elif len(operands) > 1:
        sites.leave_operands("einsum", node, *operands)


def grouped_mm(sites: Sites, node: fx.Node) -> None:
    """torch's product of runs of rows with a stack of matrices."""
    args = normalized(node)
    if args["offs"] is None and args["bias"] is None and value(args["self"]).dim() == value(args["mat2"]).dim() == 3:
        result = product(sites, node, args["self"], args["mat2"], ("Amk", "Akn", "Amn"), "grouped_linear")
        if result is not None:
            sites.replace(node, result)
    elif args["bias"] is None:
        _with_offsets(sites, node, args["self"], args["mat2"], args["offs"], out_dtype=args["out_dtype"])
    else:
        sites.leave_operands("grouped_linear", node, args["mat2"])


def foreign_grouped_mm(sites: Sites, node: fx.Node) -> None:
    """Other libraries' operator for the same."""
    _with_offsets(sites, node, *node.args)


def _with_offsets(sites: Sites, node: fx.Node, x: Any, w: Any, offsets: Any, **options: Any) -> None:
    """Rows of ``x`` in runs, each run with its own matrix of the stack ``w``."""
    source = trace(sites.program, w)
    if source is None or value(x).dim() != 2 or value(w).dim() != 3:
        sites.leave_operands("grouped_linear", node, w)
        return
    weight = sites.weight(source, lambda t: t.transpose(1, 2), "transposed")
    with sites.program.graph.inserting_before(node):
        operand = sites.cast(weight, w)
        transposed = sites.program.call(aten.transpose.int, operand, 1, 2, like=node)
        new = sites.program.call(node.target, x, transposed, offsets, like=node, **options)  # type: ignore[arg-type]
    sites.site("grouped_linear", new, weight, transposed)
    sites.replace(node, new)
