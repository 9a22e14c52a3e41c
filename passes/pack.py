"""From logical weights to the layout that a device's kernel reads: the last pass but lowering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.kernels.dispatch import Kernel, Packed, choose
from qcompile.kernels.memory import Meter
from qcompile.kernels.ops.conv import matrix_shape
from qcompile.kernels.qtensor import QTensor
from qcompile.kernels.scheme import Scheme
from qcompile.passes.base import Pass
from qcompile.passes.decision import Decision
from qcompile.passes.lift import weight_name
from qcompile.passes.multiply_codes import code_kernel
from qcompile.passes.program import Program, normalized
from qcompile.passes.quantize_activations import ROUNDINGS
from qcompile.passes.writes import is_written

qc = torch.ops.qcompile

#: The logical operators, and what each does where no kernel takes it.
LOGICAL: dict[object, tuple[str, str]] = {
    qc.linear.default: ("linear", "dequantize + matmul"),
    qc.linear_split.default: ("linear_split", "dequantize + matmul"),
    qc.linear_quantized.default: ("linear_quantized", "dequantize + matmul"),
    qc.linear_quantized_split.default: ("linear_quantized_split", "dequantize + matmul"),
    qc.embedding.default: ("embedding", "lookup + dequantize"),
    qc.conv.default: ("conv", "dequantize + convolution"),
    qc.grouped_linear.default: ("grouped_linear", "dequantize + batched matmul"),
}

_SPLITS = (qc.linear_split.default, qc.linear_quantized_split.default)


@dataclass(frozen=True)
class AssignKernels(Pass):
    """Write into each row of the report which kernel will compute it on the weight's device; the graph stays as it is.

    Before: weights are quantized and fused. After: each quantized decision has a kernel, or what is done without one.
    """

    def run(self, program: Program) -> int:
        """Decide; returns how many operators have a kernel of their own."""
        count = 0
        for node in program.calls():
            if node.target in LOGICAL:
                kernel, why = kernel_for(node)
                codes, why_not = code_kernel(program, node)
                kernel = codes or kernel
                count += kernel is not None
                x = normalized(node).get("x")
                known = None if x is None else x.meta["val"]
                name = kernel.described(*_asked(node), known) if kernel else f"{LOGICAL[node.target][1]} ({why})"
                set_kernel(node, name + (f"; activations rounded in float ({why_not})" if why_not else ""))
            elif node.target is qc.dequantize.default:
                for user in node.users:
                    set_kernel(user, f"dequantize before {user.target}")
        return count


@dataclass(frozen=True)
class Pack(Pass):
    """Replace each logical operator by its kernel's packed one, and its weight by the packed weight::

        linear(x, data, scale, zero, "qint4/…")     ->     linear_tiled(x, codes, scale, zero, bits=4, …)
        x ─► fake_quantize(s) ─► linear | conv      ->     x ─► linear_tiled | conv_tiled(x_scale=s)
        x ─► fake_quantize_dynamic ─► linear        ->     x ─► linear_tiled(per_row=True)

    A weight that several operators read in the same layout is packed once. Activations that are rounded before are rounded
    by the kernel, where it can do that and no gradient is wanted.

    Attributes:
        exact: kernels must keep float activations.

    Before: fused. After: operators for which no kernel was registered stay logical; all others are packed.
    """

    exact: bool = False

    def run(self, program: Program) -> int:
        """Rewrite; returns how many operators were packed."""
        work: dict[tuple[object, ...], tuple[list[fx.Node | None], Mapping[str, int]]] = {}
        nodes = [n for n in program.calls() if n.target in LOGICAL]
        count, meter = 0, Meter()
        for node in program.track(nodes, "packing"):
            kernel, _ = kernel_for(node)
            if kernel is None:
                continue
            if kernel.prepare is not None:
                kernel.prepare()
            meter.add(4 * normalized(node)["data"].meta["val"].numel())
            self._replace(program, node, kernel, work)
            count += 1
        program.clean()
        return count

    def _replace(self, program: Program, node: fx.Node, kernel: Kernel, work: dict[tuple[object, ...], Any]) -> None:
        args = normalized(node)
        parts, glu = args.get("sizes"), bool(args.get("glu", False))
        if "weight_shape" in args:
            parts = [*args["weight_shape"], args["groups"]]
        layout = (kernel.pack, None if parts is None else tuple(parts), glu)
        key = (args["data"], args["scale"], *layout)
        if key not in work:
            work[key] = _packed(program, node, kernel, args, parts, glu, layout)
        tensors, sizes = work[key]
        args |= _rounding(program, args.get("x"), kernel)
        with program.graph.inserting_before(node):
            arguments = kernel.arguments(tensors, sizes, {**args, "exact": self.exact})
            new = program.call(kernel.target, *arguments, like=node)
        new.meta["logical"] = node.meta["val"]  # a kernel may choose other strides
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        program.drop_unread({args["data"], args["scale"], args.get("zero")})


def _rounding(program: Program, x: fx.Node | None, kernel: Kernel) -> dict[str, Any]:
    """What takes the place of arguments where the kernel rounds ``x`` itself."""
    if x is None or x.target not in ROUNDINGS or not program.inference:
        return {}
    inner = normalized(x)
    if inner["qtype"] not in kernel.rounds or is_written(inner["x"]):
        return {}
    if x.target is qc.fake_quantize_dynamic.default:
        if kernel.operator == "conv":  # which has no tokens: the last axis of an image is its width
            return {}
        return {"x": inner["x"], "per_row": True}
    constant = program.constant(inner["scale"])
    if constant is None or constant.mutated or constant.tensor.dtype != torch.float32:
        return {}
    # as the kernel wants it: positive, and its reciprocal finite
    return {"x": inner["x"], "x_scale": inner["scale"]} if 1e-36 <= float(constant.tensor) <= 1e36 else {}


def kernel_for(node: fx.Node) -> tuple[Kernel | None, str]:
    """The kernel for a logical operator where its weight is, or None and why."""
    args = normalized(node)
    return choose(LOGICAL[node.target][0], args["data"].meta["val"].device.type, *_asked(node), args)


def _asked(node: fx.Node) -> tuple[Scheme, Sequence[int], torch.dtype]:
    """What a kernel is asked about: scheme and shape of the weight, dtype of the activations."""
    args = normalized(node)
    shape = args.get("shape") or args["weight_shape"]
    return Scheme.parse(args["scheme"]), shape, args.get("dtype") or args["x"].meta["val"].dtype


def set_kernel(node: fx.Node, kernel: str) -> None:
    """Write the kernel's name into the report rows of ``node`` and of the nodes that take its outputs apart."""
    rows: list[Decision] = list(node.meta.get("decisions", ()))
    for user in node.users:
        rows += user.meta.get("decisions", ()) if node.target in _SPLITS else ()
    for decision in rows:
        if decision.quantized:
            decision.kernel = kernel


def _packed(
    program: Program, node: fx.Node, kernel: Kernel, args: Mapping[str, Any], parts: Sequence[int] | None, glu: bool,
    layout: tuple[object, ...],
) -> tuple[list[fx.Node | None], Mapping[str, int]]:  # fmt: skip
    """Pack a weight and add its tensors to the program."""
    held = {k: program.constant(args[k]) for k in ("data", "scale", "zero") if args.get(k) is not None}
    missing = [k for k, c in held.items() if c is None]
    if missing:
        raise ValueError(f"{node.name}: {', '.join(missing)} of a quantized weight must be constants of the program")
    found = {k: c for k, c in held.items() if c is not None}
    data, scale, zero = found["data"], found["scale"], found.get("zero")
    scheme = Scheme.parse(args["scheme"])
    identity = None
    if all(c.identity is not None for c in found.values()):
        identity = ("packed", _origin([c.identity for c in found.values() if c.identity is not None]), *layout)

    def make() -> Packed:
        zero_tensor = None if zero is None else zero.tensor
        shape = args.get("shape") or matrix_shape(args["weight_shape"], args["transposed"], args["groups"])
        weight = QTensor(data.tensor, scale.tensor, zero_tensor, scheme, tuple(shape))
        return kernel.pack(weight, parts, glu)

    name = weight_name(data.name)
    original = program.originals.get(args["data"].name)
    if original is not None and layout == (original.pack, None, False):
        # The program came with it: nothing to pack, and nothing to hold twice.
        packed, identity, fresh = original.packed, None, False
    else:
        fresh = identity is None or identity not in program.memo
        packed = program.remember(identity, make, *(c.tensor for c in held.values() if c is not None))
    return [
        None if t is None else _add(program, f"{name}_packed_{i}", t, identity, fresh) for i, t in enumerate(packed.tensors)
    ], packed.sizes


def _origin(identities: Sequence[tuple[object, ...]]) -> tuple[object, ...]:
    """What stands for a weight in the key of its packed form: the codes, where scale and zero point follow from them.

    They do where all were made together of one float weight; parts that came with the program may be replaced one by one.
    """

    def made(identity: tuple[object, ...]) -> object:
        if identity[0] == "stack":
            return tuple(map(made, identity[1:]))  # type: ignore[arg-type]
        return identity[:-1] if identity[0] == "q" else identity

    together = len({made(i) for i in identities}) == 1
    return identities[0] if together else ("given", *identities)


def _add(program: Program, name: str, tensor: Tensor, identity: tuple[object, ...] | None, fresh: bool) -> fx.Node:
    node = program.add_constant(name, tensor, identity=None if identity is None else (*identity, name))
    program.constants[node.name].fresh = fresh
    return node
