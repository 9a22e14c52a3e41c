"""One spelling for each thing: every product with a constant weight becomes one of six forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from qcompile.passes.base import Pass
from qcompile.passes.canonical_convolutions import convolution
from qcompile.passes.canonical_lookups import embedding, index, rnn
from qcompile.passes.canonical_products import addmm, einsum, foreign_grouped_mm, grouped_mm, linear, matmul
from qcompile.passes.decision import Decision
from qcompile.passes.foreign import GROUPED_MM, registered
from qcompile.passes.lift import UnfitError
from qcompile.passes.program import Program, is_tensor, module_path, value
from qcompile.passes.sites import BOTH_ACTIVATIONS, Sites
from qcompile.passes.views import trace

aten = torch.ops.aten


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

    A weight that was quantized before is a dequantize of constants. It is found in the same way; there is nothing to decide
    any more, so it has a row in the report and no site. Rows of it may be cut out; where an operator reads it in another
    arrangement than its codes lie in, it stays dequantized, and the row says so.

    Before: any graph of aten operators. After: the same results; ``program.sites`` holds each form's weight, and each
    matmul-like operator without one has a row in ``program.decisions`` that says why.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many sites there are."""
        sites = Sites(program)
        handlers = dict(_HANDLERS)
        for target in registered(GROUPED_MM):
            handlers[target] = foreign_grouped_mm
        for node in program.calls():
            if node.target is aten._assert_tensor_metadata.default:
                sites.drop_assertion(node)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                _subgraphs(sites, node, program.module, handlers)
            elif value(node) is not None:
                try:
                    handlers.get(node.target, _unknown)(sites, node)
                except UnfitError:
                    _unfit(sites, node)
        sites.lifted.lower()
        program.drop_dead()
        return len(program.sites)


def _unfit(sites: Sites, node: fx.Node) -> None:
    """A product with a quantized weight whose codes lie across its reduction axis."""
    held = [s for s in (trace(sites.program, o) for o in node.all_input_nodes) if s and s.node.name in sites.lifted.stored]
    op = str(node.target).removeprefix("aten.").partition(".")[0]
    reason = "its quantized weight is read in another arrangement than its codes are stored in: it is dequantized"
    sites.leave(op, node, reason, sites.program.constants[held[0].node.name].name)


def _attention(sites: Sites, node: fx.Node) -> None:
    sites.leave("attention", node, BOTH_ACTIVATIONS)


def _not_rewritten(sites: Sites, node: fx.Node) -> None:
    """A product for which there is no form, if a weight goes into it."""
    name = str(node.target).removesuffix(".default")
    for operand in node.all_input_nodes:
        source = trace(sites.program, operand)
        if source is not None and value(operand).is_floating_point() and value(operand).dim() >= 2:
            weight = sites.program.constants[source.node.name].name
            sites.leave("matmul", node, f"{name} is not among the products that are rewritten", weight)
            return
    sites.leave_operands("matmul", node, *node.all_input_nodes)


def _subgraphs(sites: Sites, node: fx.Node, owner: torch.nn.Module, handlers: Mapping[object, object]) -> None:
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
                _subgraphs(sites, inner, body, handlers)
            elif inner.target in handlers and inner.target not in _LOOKUPS and value(inner) is not None:
                op = str(inner.target).removeprefix("aten.").partition(".")[0]
                path = module_path(inner) or module_path(node)
                reason = f"inside the body of {name}, which is not rewritten"
                sites.program.decisions.append(Decision(op, inner.name, "", path, reason=reason))


def _unknown(sites: Sites, node: fx.Node) -> None:
    """An operator of another library that reads a matrix may be a product."""
    if getattr(node.target, "namespace", "aten") in _KNOWN:
        return
    for operand in node.all_input_nodes:
        source = trace(sites.program, operand) if is_tensor(operand) else None
        if source is not None and value(operand).is_floating_point() and value(operand).dim() >= 2:
            weight = sites.program.constants[source.node.name].name
            sites.leave("custom", node, f"what the operator {node.target} computes is not known", weight)
            return


#: Namespaces whose operators are products only where the table below says so.
_KNOWN = frozenset({"aten", "prims", "prim", "quantized", "qcompile", "higher_order", "_c10d_functional", "profiler"})

#: Index into any tensor, seldom a table of weights.
_LOOKUPS = frozenset({aten.index.Tensor, aten.index_select.default})

_HANDLERS: dict[object, Callable[[Sites, fx.Node], None]] = {
    aten.linear.default: linear,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default), matmul),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), addmm),
    aten.einsum.default: einsum,
    aten._grouped_mm.default: grouped_mm,
    **dict.fromkeys(
        (
            aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
            aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
            aten.conv_transpose3d.input, aten.convolution.default,
        ),
        convolution,
    ),
    aten.embedding.default: embedding,
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), index),
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), rnn),
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
