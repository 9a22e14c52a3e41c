"""What canonicalization shares: making weights, replacing nodes, keeping the books."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, fx

from qcompile.passes.decision import Decision
from qcompile.passes.lift import Lifted
from qcompile.passes.program import Program, Site, module_path, normalized, value
from qcompile.passes.views import COPIES, VIEWS, Source, made_from, trace

aten = torch.ops.aten
qc = torch.ops.qcompile

BOTH_ACTIVATIONS = "both operands are activations"


class Sites:
    """The sites found so far, and the placeholders made for their weights."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.lifted = Lifted(program)
        self.made: dict[tuple[object, ...], fx.Node] = {}

    def weight(self, source: Source, arrange: Callable[[Tensor], Tensor] | None = None, how: Hashable = None) -> fx.Node:
        """The placeholder for a rearranged view of a constant; the same one for the same view.

        Args:
            source: the view.
            arrange: what is done to it; None leaves it.
            how: tells one ``arrange`` from another where the result has to be a copy.
        """
        constant = self.program.constants[source.node.name]

        def arranged(tensor: Tensor) -> Tensor:
            view = source.evaluate(tensor)
            return view if arrange is None else arrange(view)

        view = arranged(constant.tensor)
        layout: tuple[Hashable, ...] = (view.storage_offset(), tuple(view.shape), view.stride())
        if view.untyped_storage()._cdata != constant.tensor.untyped_storage()._cdata:
            # Copies of one constant may be laid out alike and hold different orders of its elements.
            layout = (*layout, "copy", source.path, how)
        elif layout == (constant.tensor.storage_offset(), tuple(constant.tensor.shape), constant.tensor.stride()):
            return source.node
        key = (source.node.name, *layout)
        if key not in self.made:
            name = constant.name + (source.label if view.numel() != constant.tensor.numel() else "")
            if source.node.name in self.lifted.stored:
                self.made[key] = self.lifted.view(source.node, name, view, arranged)
                return self.made[key]
            identity = None if constant.identity is None else (*constant.identity, *layout)
            self.made[key] = self.program.add_constant(name, view, like=constant, identity=identity)
        return self.made[key]

    def site(self, op: str, node: fx.Node, weight: fx.Node, operand: fx.Node) -> None:
        """Record a product with a constant; ``operand`` is what ``node`` reads: the weight, or a view or cast of it."""
        use = node
        while operand is not weight:
            use, operand = operand, operand.args[0]  # type: ignore[assignment]
        constant = self.program.constants[weight.name]
        stored = self.lifted.stored.get(weight.name)
        size = constant.tensor.numel() * constant.tensor.element_size()
        decision = Decision(
            op, node.name, stored.name if stored else constant.name, module_path(node), tuple(constant.tensor.shape),
            float_bytes=size, bytes=size, activations=_activations(node),
        )  # fmt: skip
        if stored is None:
            self.program.sites.append(Site(node, weight, (use,), decision))
        else:
            # Quantized before: there is nothing to decide any more.
            decision.scheme, decision.bytes = stored.scheme, stored.nbytes
            decision.shared = any(d.weight == decision.weight and d.quantized for d in self.program.decisions)
            if decision.shared and any((d.op, d.node) == (op, node.name) for d in self.program.decisions):
                return
        node.meta.setdefault("decisions", []).append(decision)
        self.program.decisions.append(decision)

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


#: Between the rounding of an activation and its use: what moves elements, or fills the edges.
_MOVES = VIEWS | COPIES | {aten.constant_pad_nd.default, aten.expand.default}


def _activations(node: fx.Node) -> str | None:
    """How the activation that a product reads was rounded, where it was."""
    x: object = node.args[0]
    while isinstance(x, fx.Node) and x.target in _MOVES:
        x = x.args[0]
    if isinstance(x, fx.Node) and x.target is qc.fake_quantize.default:
        return f"{normalized(x)['qtype']} static"
    if isinstance(x, fx.Node) and x.target is qc.fake_quantize_dynamic.default:
        return f"{normalized(x)['qtype']} dynamic"
    return None
