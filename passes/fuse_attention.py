"""Attention goes to the kernels that read no key in vain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.kernels.cpu.build import ensure_loaded
from qcompile.passes.base import Pass
from qcompile.passes.program import Program, is_tensor, normalized, shape_of
from qcompile.passes.shapes import same_shape, same_size

aten = torch.ops.aten
qc = torch.ops.qcompile

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

#: The widest head for which the kernels keep all the rows at hand that they work on at a time.
WIDEST_HEAD = 256


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Compute attention by the kernels made for it::

        scaled_dot_product_attention(q, k, v, mask)   ->   qcompile.attention(q, k, v, mask, scale, is_causal)

    They read the keys and values that the mask shows, once for all heads that share them, and take a mask of any kind as it
    is; torch's read all of them, a cache with what is still empty of it. There is one for few queries, such as a step over a
    cache, and one for many, which tells from each block of keys which queries see it. Only where torch's own would run
    without dropout, on the CPU, for inference, and where the kernels can be built; any number of queries, known or not.

    Before: :class:`~qcompile.passes.group_attention.GroupAttention`. After: the same results up to rounding.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many attentions were changed."""
        if not program.inference:
            return 0
        found = [n for n in program.calls(aten.scaled_dot_product_attention.default) if _fits(normalized(n), n)]
        if not found or not ensure_loaded().loaded:
            return 0
        for node in found:
            args = normalized(node)
            scale = args["scale"] if args["scale"] is not None else shape_of(args["query"])[3] ** -0.5
            with program.graph.inserting_before(node):
                operands = (args["query"], args["key"], args["value"], _narrow(args["attn_mask"]))
                new = program.call(qc.attention.default, *operands, float(scale), bool(args["is_causal"]), like=node)
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)
        return len(found)


def _narrow(mask: Any) -> Any:
    """The mask before it was expanded: the kernels broadcast it; Inductor would write the expanded one for each layer."""
    while isinstance(mask, fx.Node) and mask.target is aten.expand.default and is_tensor(mask.args[0]):
        mask = mask.args[0]
    return mask


def _fits(args: dict[str, Any], node: fx.Node) -> bool:
    operands = [args["query"], args["key"], args["value"]]
    if args["dropout_p"] != 0.0 or not all(is_tensor(t) for t in operands):
        return False
    if args["is_causal"] and args["attn_mask"] is not None:  # an error, which torch's operator reports
        return False
    if not isinstance(args["scale"], (float, int, type(None))):
        return False
    dtype = node.meta["val"].dtype
    alike = all(t.meta["val"].device.type == "cpu" and t.meta["val"].dtype == dtype for t in operands)
    q, k, v = (shape_of(t) for t in operands)
    if not alike or dtype not in _FLOATS or not len(q) == len(k) == len(v) == 4:
        return False
    known = all(isinstance(n, int) for n in (q[1], k[1], q[3], v[3]))
    if not known or not 1 <= q[3] <= WIDEST_HEAD or not 1 <= v[3] <= WIDEST_HEAD:
        return False
    # torch broadcasts batches and single heads too; the kernel does not
    if not (same_size(q[0], k[0]) and same_size(q[3], k[3]) and same_shape(k[:3], v[:3])):
        return False
    shared = k[1] > 0 and q[1] % k[1] == 0 if args["enable_gqa"] else q[1] == k[1]
    return shared and _mask_fits(args["attn_mask"], (*q[:3], k[2]), dtype)


def _mask_fits(mask: object, full: tuple[Any, ...], dtype: torch.dtype) -> bool:
    if mask is None:
        return True
    if not is_tensor(mask):
        return False
    value = mask.meta["val"]  # type: ignore[attr-defined]
    if value.device.type != "cpu" or value.dtype not in (torch.bool, torch.float32, dtype) or value.dim() > 4:
        return False
    pairs = zip(reversed(value.shape), reversed(full), strict=False)
    return all(same_size(a, 1) or same_size(a, b) for a, b in pairs)
