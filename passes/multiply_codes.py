"""Where a device multiplies codes by codes, activations that are rounded become codes, and stay so into the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.kernels.dispatch import Kernel, choose, kernels
from qcompile.kernels.scheme import Scheme
from qcompile.passes.base import Pass
from qcompile.passes.program import Program, getitem, is_tensor, normalized, shape_of, value
from qcompile.passes.quantize_activations import ROUNDINGS
from qcompile.passes.writes import is_written

aten = torch.ops.aten
qc = torch.ops.qcompile

#: What becomes what.
PRODUCTS: dict[object, torch._ops.OpOverload] = {
    qc.linear.default: qc.linear_quantized.default,
    qc.linear_split.default: qc.linear_quantized_split.default,
}


@dataclass(frozen=True)
class MultiplyCodes(Pass):
    """Round activations to codes, once for all that read them, together with a norm that nothing else reads::

                                           ┌► linear(q)                                   ┌► linear_quantized(q)
        norm ─► fake_quantize_dynamic ─────┼► linear(k)     ->  norm_quantize ─[codes, s]─┼► linear_quantized(k)
                                           └► linear_split                                └► linear_quantized_split
        x ─► fake_quantize(s) ─► linear                     ->  norm_quantize("none", fixed=s) ─► linear_quantized

    The norm is ``rms_norm`` or ``layer_norm`` over the last axis. A product whose weight cannot be multiplied in codes (4
    bits, affine, …) goes on reading the rounding; then the norm stays, too.

    Only where the device has a kernel for products of codes that takes the weight, the kernel for the float product does not
    round by itself, and no gradient is wanted.

    Before: siblings and epilogues are fused, norms found. After: the same results up to rounding.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many products multiply codes now."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in program.calls(*PRODUCTS):
            if code_kernel(program, node)[0] is not None:
                readers.setdefault(normalized(node)["x"], []).append(node)
        for rounding, nodes in readers.items():
            codes, scale = _codes(program, rounding, alone=set(rounding.users) == set(nodes))
            for node in nodes:
                _multiply(program, node, codes, scale)
        program.clean()
        return sum(map(len, readers.values()))


def code_kernel(program: Program, node: fx.Node) -> tuple[Kernel | None, str]:
    """The kernel that will multiply codes in the place of a fused linear; or None, and why, where the device has one."""
    if node.target not in PRODUCTS or not program.inference or normalized(node)["x"].target not in ROUNDINGS:
        return None, ""
    args = normalized(node)
    x, scheme, shape = args["x"], Scheme.parse(args["scheme"]), args["shape"]
    rounded, dtype = normalized(x)["qtype"], value(x).dtype
    device = value(args["data"]).device.type
    floats, _ = choose(_operator(node.target), device, scheme, shape, dtype, args)
    product = _operator(PRODUCTS[node.target])
    if (floats is not None and rounded in floats.rounds) or not kernels(product, device):
        return None, ""
    given = {**args, "x_scheme": token_scheme(rounded, shape[1]), "dtype": dtype}
    return choose(product, device, scheme, shape, dtype, given)


def _operator(target: Any) -> str:
    """As the table of kernels knows it."""
    return str(target._schema.name).partition("::")[2]


def token_scheme(rounded: str, features: int) -> str:
    """The scheme of activations with a scale for each token."""
    return f"{rounded}/group={features}/symmetric/float32"


def _codes(program: Program, rounding: fx.Node, alone: bool) -> tuple[fx.Node, fx.Node]:
    """Codes and scale of what ``rounding`` rounds; ``alone``: none of its readers is left."""
    args = normalized(rounding)
    x, norm, weight, bias, eps = args["x"], "none", None, None, 0.0
    found = _norm(x) if alone and set(x.users) == {rounding} else None
    if found is not None:
        x, norm, weight, bias, eps = found
    with program.graph.inserting_before(rounding):
        both = program.call(
            qc.norm_quantize.default, x, weight, bias, eps, norm, args["qtype"], args.get("scale"), like=rounding
        )
        return getitem(program, both, 0, rounding), getitem(program, both, 1, rounding)


def _norm(node: fx.Node) -> tuple[fx.Node, str, fx.Node | None, fx.Node | None, float] | None:
    """Input, kind, weight, bias and eps of a norm over the last axis, where nothing writes to its input."""
    if node.target not in (aten.rms_norm.default, aten.layer_norm.default):
        return None
    args = normalized(node)
    x, layer = args["input"], node.target is aten.layer_norm.default
    if not is_tensor(x) or is_written(x) or not _over_last(args["normalized_shape"], shape_of(x)):
        return None
    if args["eps"] is None:  # what stands for it depends on the device
        return None
    return x, "layer" if layer else "rms", args["weight"], args.get("bias"), float(args["eps"])


def _over_last(sizes: Sequence[Any], shape: Sequence[Any]) -> bool:
    return len(sizes) == 1 and isinstance(sizes[0], int) and sizes[0] == shape[-1]


def _multiply(program: Program, node: fx.Node, codes: fx.Node, scale: fx.Node) -> None:
    """Put the product of codes in the place of a linear."""
    args = normalized(node)
    x = args["x"]
    x_scheme = token_scheme(normalized(x)["qtype"], args["shape"][1])
    product = (codes, scale, args["data"], args["scale"], args["bias"], x_scheme)
    rest = (args["sizes"],) if "sizes" in args else (args["activation"], args["mul"], args["add"], args["glu"])
    with program.graph.inserting_before(node):
        new = program.call(
            PRODUCTS[node.target], *product, args["scheme"], args["shape"], value(x).dtype, *rest, like=node
        )
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
