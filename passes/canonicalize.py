"""One spelling for each thing: every product with a constant weight becomes one of six forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.kernels.ops.conv import matrix_shape, rows_of
from qcompile.passes.base import Pass
from qcompile.passes.contraction import Contraction, parse_einsum
from qcompile.passes.decision import Decision
from qcompile.passes.foreign import GROUPED_MM, registered
from qcompile.passes.program import Program, Site, is_tensor, module_path, normalized, shape_of, static_shape, value
from qcompile.passes.shapes import same_size
from qcompile.passes.views import Source, made_from, repeated, trace

aten = torch.ops.aten

BOTH_ACTIVATIONS = "both operands are activations"


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring every matmul-like operator whose weight is a constant to one of six forms, and list these sites::

        x @ w,  w @ x,  mm, addmm, einsum, F.linear     ->  aten.linear(x, W[N, K], bias)
        x @ w3, bmm, baddbmm, einsum with a batch label  ->  aten.bmm(x, transpose(W[E, N, K], 1, 2))
        grouped_mm(x, w3, offsets)                       ->  aten._grouped_mm(x, transpose(W[E, N, K], 1, 2), offsets)
        conv1d, conv2d, conv3d, conv_transpose*          ->  aten.convolution(x, reshape(W[O, R]), bias, ...)
        embedding, index_select, w[indices]              ->  aten.embedding(W[V, D], i) or aten.index(W[V, ...], [i])
        lstm, gru, rnn                                   ->  as they are, each 2-d weight a site

    W is a placeholder of its own, a view of the user's tensor with the reduction axis last: transposes, slices and casts
    between the tensor and its use are folded into it. The same view is made once, however many operators read it.

    Before: any graph of aten operators. After: the same results; ``program.sites`` holds each form's weight, and each
    matmul-like operator without one has a row in ``program.decisions`` that says why.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many sites there are."""
        work = _Work(program)
        handlers = dict(_HANDLERS)
        for target in registered(GROUPED_MM):
            handlers[target] = _foreign_grouped_mm
        for node in program.calls():
            if node.target is aten._assert_tensor_metadata.default:
                work.drop_assertion(node)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                _subgraphs(work, node, program.module, handlers)
            elif value(node) is not None:
                handlers.get(node.target, _unknown)(work, node)
        program.graph.eliminate_dead_code()
        return len(program.sites)


class _Work:
    """What the handlers share: making weights, replacing nodes, keeping the books."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made: dict[tuple[object, ...], fx.Node] = {}

    def weight(self, source: Source, arrange: Callable[[Tensor], Tensor] = lambda w: w) -> fx.Node:
        """The placeholder for ``arrange(view of a constant)``; the same one for the same view."""
        constant = self.program.constants[source.node.name]
        view = arrange(source.evaluate(constant.tensor))
        layout = (view.storage_offset(), tuple(view.shape), view.stride())
        if layout == (constant.tensor.storage_offset(), tuple(constant.tensor.shape), constant.tensor.stride()):
            return source.node
        key = (source.node.name, *layout)
        if key not in self.made:
            name = constant.name + (source.label if view.numel() != constant.tensor.numel() else "")
            identity = None if constant.identity is None else (*constant.identity, *layout)
            self.made[key] = self.program.add_constant(name, view, like=constant, identity=identity)
        return self.made[key]

    def site(self, op: str, node: fx.Node, weight: fx.Node, operand: fx.Node) -> None:
        """Record a product with a constant; ``operand`` is what ``node`` reads: the weight, or a view or cast of it."""
        use = node
        while operand is not weight:
            use, operand = operand, operand.args[0]  # type: ignore[assignment]
        constant = self.program.constants[weight.name]
        size = constant.tensor.numel() * constant.tensor.element_size()
        decision = Decision(
            op, node.name, constant.name, module_path(node), tuple(constant.tensor.shape), float_bytes=size, bytes=size
        )
        node.meta.setdefault("decisions", []).append(decision)
        self.program.decisions.append(decision)
        self.program.sites.append(Site(node, weight, (use,), decision))

    def leave(self, op: str, node: fx.Node, reason: str, weight: str = "") -> None:
        """Record a product that is left alone."""
        self.program.decisions.append(Decision(op, node.name, weight, module_path(node), reason=reason))

    def leave_operands(self, op: str, node: fx.Node, *operands: object) -> None:
        """Record a product that has no constant operand, or more than one, and say what they are."""
        held = [s for s in (trace(self.program, o) for o in operands) if s is not None]
        weights = [self.program.constants[s.node.name].name for s in held]
        if len(weights) > 1:
            return self.leave(op, node, f"more than one operand is a weight ({', '.join(weights)})", weights[0])
        for operand in operands:
            names = made_from(self.program, operand) if isinstance(operand, fx.Node) and not weights else None
            if names and isinstance(operand, fx.Node):
                by = str(operand.target).removesuffix(".default")
                reason = f"weight is computed at run time (by {by}) from {', '.join(names)}"
                return self.leave(op, node, reason, names[0])
        return self.leave(op, node, BOTH_ACTIVATIONS, *weights)

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Put ``new`` in the place of ``node``; the result keeps its dtype (autocast may have set it)."""
        want = value(node).dtype
        if value(new).dtype != want:
            new = self.program.call(aten.to.dtype, new, want, like=node)
        node.replace_all_uses_with(new)
        self.program.graph.erase_node(node)

    def drop_assertion(self, node: fx.Node) -> None:
        """Erase the check of a constant's dtype: it holds already, and would keep the float weight in the program."""
        if trace(self.program, node.args[0]) is not None:
            self.program.graph.erase_node(node)

    def cast(self, x: fx.Node, node: fx.Node) -> fx.Node:
        """``x`` in the dtype of ``node``, in which it computes: autocast and promotion become visible."""
        want = value(node).dtype
        return x if value(x).dtype == want else self.program.call(aten.to.dtype, x, want, like=node)


def _product(work: _Work, node: fx.Node, x: object, w: object, labels: tuple[str, str, str], op: str) -> fx.Node | None:
    """A product of two operands, either of which may be the constant; returns what takes the place of ``node``."""
    for activation, operand, order in ((x, w, (0, 1)), (w, x, (1, 0))):
        source = trace(work.program, operand)
        if source is None or not is_tensor(activation) or trace(work.program, activation) is not None:
            continue
        contraction = Contraction(labels[order[0]], labels[order[1]], labels[2])
        sizes = static_shape(operand)
        if contraction.kind is None or sizes is None or not _broadcast_free(contraction, activation, sizes):
            name = work.program.constants[source.node.name].name
            work.leave(op, node, f"a product of the form {','.join(labels[:2])}->{labels[2]} is not a linear", name)
            return None
        weight = work.weight(source, contraction.arrange)
        with work.program.graph.inserting_before(node):
            activation = work.cast(activation, node)  # type: ignore[arg-type]
            operand = work.cast(weight, node)
            result = contraction.emit(work.program, node, activation, operand, sizes)
        _record(work, contraction.kind, result, weight)
        return result
    work.leave_operands(op, node, w, x)
    return None


def _record(work: _Work, kind: str, result: fx.Node, weight: fx.Node) -> None:
    """Find the linear or bmm that was just emitted on the way to ``result``, and record it as a site."""
    current = result
    while current.target not in (aten.linear.default, aten.bmm.default):
        current = current.args[0]  # type: ignore[assignment]
    work.site(kind, current, weight, current.args[1])  # type: ignore[arg-type]


def _broadcast_free(contraction: Contraction, x: object, sizes: tuple[int, ...]) -> bool:
    """Whether labels that both operands share have the same size (einsum and matmul also allow 1 against n)."""
    for label, size in zip(contraction.weight, sizes, strict=True):
        if label in contraction.x and not same_size(shape_of(x)[contraction.x.index(label)], size):  # type: ignore[arg-type]
            return False
    return True


def _linear(work: _Work, node: fx.Node) -> None:
    args = normalized(node)
    source, other = trace(work.program, args["weight"]), trace(work.program, args["input"])
    if source is None or (other is not None and work.program.constants[other.node.name].is_parameter):
        work.leave_operands("linear", node, args["weight"], args["input"])
        return
    weight = work.weight(source)
    with work.program.graph.inserting_before(node):
        x, operand = work.cast(args["input"], node), work.cast(weight, node)
        bias = None if args["bias"] is None else work.cast(args["bias"], node)
        new = work.program.call(aten.linear.default, x, operand, bias, like=node)
    work.site("linear", new, weight, operand)
    work.replace(node, new)


def _matmul(work: _Work, node: fx.Node) -> None:
    args = normalized(node)
    x, w = args["self"], args.get("other", args.get("mat2", args.get("vec")))
    if _broadcast(work, node, x, w):
        return
    labels = _matmul_labels(value(x).dim(), value(w).dim())
    result = _product(work, node, x, w, labels, "matmul")
    if result is not None:
        work.replace(node, result)


def _broadcast(work: _Work, node: fx.Node, x: object, w: object) -> bool:
    """A batched product that repeats a constant by ``expand``, as decomposed graphs do; the constant is taken unrepeated."""
    held = repeated(work.program, w) or repeated(work.program, x)
    if held is None or value(x).dim() != 3 or value(w).dim() != 3:
        return False
    left = repeated(work.program, w) is None
    other = w if left else x
    stack = "A" * (value(held.node).dim() - 2)
    if not is_tensor(other) or trace(work.program, other) is not None:
        return False
    with work.program.graph.inserting_before(node):
        batch = ("B" if held.times is not None else "") + (stack or "A")
        if held.times is not None:
            sizes = [held.times, shape_of(held.node)[0]]
            other = work.program.call(aten.unflatten.int, other, 0, sizes, like=node)
    own, rest = (stack + "mk", batch + "kn") if left else (stack + "kn", batch + "mk")
    labels = (own, rest, batch + "mn") if left else (rest, own, batch + "mn")
    first, second = (held.node, other) if left else (other, held.node)
    result = _product(work, node, first, second, labels, "matmul")
    if result is None:
        return True
    if held.times is not None:
        with work.program.graph.inserting_before(node):
            result = work.program.call(aten.flatten.using_ints, result, 0, 1, like=node)
    work.replace(node, result)
    return True


def _matmul_labels(left: int, right: int) -> tuple[str, str, str]:
    """The labels of ``torch.matmul`` for operands of these ranks."""
    batch = "ABCDEFGH"
    x = "k" if left == 1 else batch[8 - (left - 2) :] * (left > 2) + "mk"
    w = "k" if right == 1 else batch[8 - (right - 2) :] * (right > 2) + "kn"
    longest = max(x[:-2], w[:-2], key=len)
    return x, w, longest + ("m" if left > 1 else "") + ("n" if right > 1 else "")


def _addmm(work: _Work, node: fx.Node) -> None:
    args = normalized(node)
    x, w = args.get("mat1", args.get("batch1")), args.get("mat2", args.get("batch2"))
    labels = ("Amk", "Akn", "Amn") if value(x).dim() == 3 else ("mk", "kn", "mn")
    result = _product(work, node, x, w, labels, "matmul")
    if result is None:
        return
    with work.program.graph.inserting_before(node):
        if args["alpha"] != 1:
            result = work.program.call(aten.mul.Scalar, result, args["alpha"], like=node)
        bias = args["self"]
        whole = args["alpha"] == 1 and args["beta"] == 1 and static_shape(bias) == (shape_of(node)[-1],)
        if whole and result.target is aten.linear.default:
            result.args = (result.args[0], result.args[1], work.cast(bias, node))
        elif args["beta"] != 0:
            result = work.program.call(aten.add.Tensor, result, bias, alpha=args["beta"], like=node)
    work.replace(node, result)


def _einsum(work: _Work, node: fx.Node) -> None:
    args = normalized(node)
    operands = args["tensors"]
    labels = parse_einsum(args["equation"], [value(t).dim() for t in operands])
    if labels is None:
        _left_einsum(work, node, operands)
        return
    result = _product(work, node, operands[0], operands[1], labels, "einsum")
    if result is not None:
        work.replace(node, result)


def _left_einsum(work: _Work, node: fx.Node, operands: list[fx.Node]) -> None:
    """Record an einsum that is not a product of two."""
    weights = [work.program.constants[s.node.name].name for s in (trace(work.program, o) for o in operands) if s]
    if weights:
        work.leave("einsum", node, f"an einsum of {len(operands)} operands", weights[0])
    elif len(operands) > 1:
        work.leave_operands("einsum", node, *operands)


def _grouped_mm(work: _Work, node: fx.Node) -> None:
    args = normalized(node)
    if args["offs"] is None and args["bias"] is None and value(args["self"]).dim() == value(args["mat2"]).dim() == 3:
        result = _product(work, node, args["self"], args["mat2"], ("Amk", "Akn", "Amn"), "grouped_linear")
        if result is not None:
            work.replace(node, result)
    elif args["bias"] is None:
        _with_offsets(work, node, args["self"], args["mat2"], args["offs"], out_dtype=args["out_dtype"])
    else:
        work.leave_operands("grouped_linear", node, args["mat2"])


def _foreign_grouped_mm(work: _Work, node: fx.Node) -> None:
    _with_offsets(work, node, *node.args)


def _with_offsets(work: _Work, node: fx.Node, x: Any, w: Any, offsets: Any, **options: Any) -> None:
    """Rows of ``x`` in runs, each run with its own matrix of the stack ``w``."""
    source = trace(work.program, w)
    if source is None or value(x).dim() != 2 or value(w).dim() != 3:
        work.leave_operands("grouped_linear", node, w)
        return
    weight = work.weight(source, lambda t: t.transpose(1, 2))
    with work.program.graph.inserting_before(node):
        operand = work.cast(weight, w)
        transposed = work.program.call(aten.transpose.int, operand, 1, 2, like=node)
        new = work.program.call(node.target, x, transposed, offsets, like=node, **options)  # type: ignore[arg-type]
    work.site("grouped_linear", new, weight, transposed)
    work.replace(node, new)


def _convolution(work: _Work, node: fx.Node) -> None:
    args = normalized(node)
    source = trace(work.program, args["weight"])
    if source is None:
        work.leave_operands("conv", node, args["weight"])
        return
    shape = static_shape(args["weight"])
    if shape is None:
        raise ValueError(f"{node.name}: a constant of unknown shape")
    rank = len(shape) - 2
    transposed = bool(args.get("transposed", "transpose" in str(node.target)))
    stride, dilation, padding = (_spread(args[k], rank) for k in ("stride", "dilation", "padding"))
    output_padding, groups = _spread(args.get("output_padding", 0), rank), args["groups"]
    weight = work.weight(source, lambda w: rows_of(w, transposed, groups))
    program = work.program
    with program.graph.inserting_before(node):
        x, operand = work.cast(args["input"], node), work.cast(weight, node)
        bias = None if args["bias"] is None else work.cast(args["bias"], node)
        batched = value(x).dim() == rank + 2
        x = x if batched else program.call(aten.unsqueeze.default, x, 0, like=node)
        if isinstance(padding, str):
            x, padding = _pad(program, node, x, padding, shape[2:], dilation)
        rows, _ = matrix_shape(shape, transposed, groups)
        if transposed:
            sizes = [groups, rows // groups, shape[0] // groups, *shape[2:]]
            kernel = program.call(aten.reshape.default, operand, sizes, like=node)
            kernel = program.call(aten.transpose.int, kernel, 1, 2, like=node)
            kernel = program.call(aten.reshape.default, kernel, list(shape), like=node)
        else:
            kernel = program.call(aten.reshape.default, operand, list(shape), like=node)
        new = result = program.call(
            aten.convolution.default,
            x,
            kernel,
            bias,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            groups,
            like=node,
        )
        result = result if batched else program.call(aten.squeeze.dim, result, 0, like=node)
    work.site("conv", new, weight, kernel)
    work.replace(node, result)


def _spread(sizes: Any, rank: int) -> Any:
    """A convolution option as a list with one entry an axis (one number stands for all); padding words stay words."""
    if isinstance(sizes, str):
        return sizes
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes]
    return sizes * rank if len(sizes) == 1 else sizes


def _pad(
    program: Program, node: fx.Node, x: fx.Node, word: str, kernel: tuple[int, ...], dilation: list[int]
) -> tuple[fx.Node, list[int]]:
    """``padding="same"`` or ``"valid"`` in numbers; what cannot be split evenly is padded beforehand, at the end."""
    if word == "valid":
        return x, [0] * len(kernel)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        extra = [n for t in reversed(total) for n in (0, t % 2)]
        x = program.call(aten.constant_pad_nd.default, x, extra, like=node)
    return x, [t // 2 for t in total]


def _embedding(work: _Work, node: fx.Node) -> None:
    args = normalized(node)
    source = trace(work.program, args["weight"])
    if source is None:
        work.leave_operands("embedding", node, args["weight"])
        return
    weight = work.weight(source)
    with work.program.graph.inserting_before(node):
        new = work.program.call(aten.embedding.default, weight, args["indices"], like=node)
    work.site("embedding", new, weight, weight)
    work.replace(node, new)


def _index(work: _Work, node: fx.Node) -> None:
    """A lookup of whole rows in a constant, ``w[indices]``; any other indexing is no matmul's business."""
    args = normalized(node)
    source = trace(work.program, args["self"])
    indices = args.get("indices", args.get("index"))
    if isinstance(indices, (list, tuple)):
        indices = indices[0] if len(indices) == 1 else None
    if source is None or not is_tensor(indices) or args.get("dim", 0) != 0 or value(args["self"]).dim() < 2:
        return
    if value(indices).dtype not in (torch.int64, torch.int32) or not value(args["self"]).is_floating_point():
        return
    weight = work.weight(source)
    program = work.program
    with program.graph.inserting_before(node):
        # Indexing counts negative numbers from the end, a table lookup does not.
        negative = program.call(aten.lt.Scalar, indices, 0, like=node)
        wrapped = program.call(aten.add.Tensor, indices, shape_of(args["self"])[0], like=node)
        indices = program.call(aten.where.self, negative, wrapped, indices, like=node)
        new = program.call(aten.index.Tensor, weight, [indices], like=node)
    work.site("embedding", new, weight, weight)
    work.replace(node, new)


def _rnn(work: _Work, node: fx.Node) -> None:
    for parameter in normalized(node)["params"]:
        source = trace(work.program, parameter)
        if source is not None and value(parameter).dim() == 2:
            if source.steps:
                parameter.replace_all_uses_with(work.weight(source))
            work.site("rnn", node, work.weight(source), work.weight(source))


def _attention(work: _Work, node: fx.Node) -> None:
    work.leave("attention", node, BOTH_ACTIVATIONS)


def _not_rewritten(work: _Work, node: fx.Node) -> None:
    """A product for which there is no form, if a weight goes into it."""
    name = str(node.target).removesuffix(".default")
    for operand in node.all_input_nodes:
        source = trace(work.program, operand)
        if source is not None and value(operand).is_floating_point() and value(operand).dim() >= 2:
            weight = work.program.constants[source.node.name].name
            work.leave("matmul", node, f"{name} is not among the products that are rewritten", weight)
            return
    work.leave_operands("matmul", node, *node.all_input_nodes)


def _subgraphs(work: _Work, node: fx.Node, owner: torch.nn.Module, handlers: Mapping[object, object]) -> None:
    """Record the products in the bodies of a loop or branch, which are left as they are.

    They are told by operators, as the weights are inputs of the body: which tensor goes in may change from step to step.
    """
    name = str(node.target)
    for argument in node.all_input_nodes:
        body = getattr(owner, str(argument.target), None) if argument.op == "get_attr" else None
        if not isinstance(body, fx.GraphModule):
            continue
        for inner in body.graph.nodes:
            if isinstance(inner.target, torch._ops.HigherOrderOperator):
                _subgraphs(work, inner, body, handlers)
            elif inner.target in handlers and inner.target not in _LOOKUPS and value(inner) is not None:
                op = str(inner.target).removeprefix("aten.").partition(".")[0]
                path = module_path(inner) or module_path(node)
                reason = f"inside the body of {name}, which is not rewritten"
                work.program.decisions.append(Decision(op, inner.name, "", path, reason=reason))


def _unknown(work: _Work, node: fx.Node) -> None:
    """An operator of another library that reads a matrix may be a product."""
    if getattr(node.target, "namespace", "aten") in _KNOWN:
        return
    for operand in node.all_input_nodes:
        source = trace(work.program, operand) if is_tensor(operand) else None
        if source is not None and value(operand).is_floating_point() and value(operand).dim() >= 2:
            weight = work.program.constants[source.node.name].name
            work.leave("custom", node, f"what the operator {node.target} computes is not known", weight)
            return


#: Namespaces whose operators are products only where the table below says so.
_KNOWN = frozenset({"aten", "prims", "prim", "quantized", "qcompile", "higher_order", "_c10d_functional", "profiler"})

#: Index into any tensor, seldom a table of weights.
_LOOKUPS = frozenset({aten.index.Tensor, aten.index_select.default})

_HANDLERS: dict[object, Callable[[_Work, fx.Node], None]] = {
    aten.linear.default: _linear,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default), _matmul),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _addmm),
    aten.einsum.default: _einsum,
    aten._grouped_mm.default: _grouped_mm,
    **dict.fromkeys(
        (
            aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
            aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
            aten.conv_transpose3d.input, aten.convolution.default,
        ),
        _convolution,
    ),
    aten.embedding.default: _embedding,
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), _index),
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), _rnn),
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys(
        (
            aten.bilinear.default, aten._trilinear.default, aten.addbmm.default, aten.addmv.default,
            aten.linalg_multi_dot.default, aten.chain_matmul.default, aten.embedding_bag.default,
            aten.embedding_bag.padding_idx, aten._convolution.default, aten._convolution.deprecated,
        ),
        _not_rewritten,
    ),
}  # fmt: skip
