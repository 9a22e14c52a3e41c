"""Tables that are looked up, and recurrent layers, whose weights are inputs of one operator."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.passes.program import is_tensor, normalized, shape_of, value
from qcompile.passes.sites import Sites
from qcompile.passes.views import trace

aten = torch.ops.aten


def embedding(sites: Sites, node: fx.Node) -> None:
    """``F.embedding`` of a constant table."""
    args = normalized(node)
    source = trace(sites.program, args["weight"])
    if source is None:
        sites.leave_operands("embedding", node, args["weight"])
        return
    weight = sites.weight(source)
    with sites.program.graph.inserting_before(node):
        new = sites.program.call(aten.embedding.default, weight, args["indices"], like=node)
    sites.site("embedding", new, weight, weight)
    sites.replace(node, new)


def index(sites: Sites, node: fx.Node) -> None:
    """A lookup of whole rows in a constant, ``w[indices]``; any other indexing is no matmul's business."""
    args = normalized(node)
    source = trace(sites.program, args["self"])
    indices = args.get("indices", args.get("index"))
    if isinstance(indices, (list, tuple)):
        indices = indices[0] if len(indices) == 1 else None
    if source is None or not is_tensor(indices) or args.get("dim", 0) != 0 or value(args["self"]).dim() < 2:
        return
    if value(indices).dtype not in (torch.int64, torch.int32) or not value(args["self"]).is_floating_point():
        return
    weight = sites.weight(source)
    program = sites.program
    with program.graph.inserting_before(node):
        # Indexing counts negative numbers from the end, a table lookup does not.
        negative = program.call(aten.lt.Scalar, indices, 0, like=node)
        wrapped = program.call(aten.add.Tensor, indices, shape_of(args["self"])[0], like=node)
        indices = program.call(aten.where.self, negative, wrapped, indices, like=node)
        new = program.call(aten.index.Tensor, weight, [indices], like=node)
    sites.site("embedding", new, weight, weight)
    sites.replace(node, new)


def rnn(sites: Sites, node: fx.Node) -> None:
    """A recurrent layer: each of its matrices is a site."""
    for parameter in normalized(node)["params"]:
        source = trace(sites.program, parameter)
        if source is not None and value(parameter).dim() == 2:
            if source.steps:
                parameter.replace_all_uses_with(sites.weight(source))
            sites.site("rnn", node, sites.weight(source), sites.weight(source))
