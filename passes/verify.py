"""What must hold between passes; checked in tests and under ``QCOMPILE_VERIFY=1``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.kernels.qtensor import check_parts
from qcompile.kernels.scheme import Scheme
from qcompile.passes.held import HELD
from qcompile.passes.program import Program, normalized
from qcompile.passes.shapes import same_shape

qc = torch.ops.qcompile
aten = torch.ops.aten


class VerificationError(RuntimeError):
    """A pass left a program in a state that its successors must not see; the message names pass and node."""


@dataclass(frozen=True)
class Signature:
    """Shapes and dtypes of a program's results, and the names of the inputs that are neither constants nor may be held."""

    results: tuple[object, ...]
    inputs: tuple[str, ...]

    @staticmethod
    def of(program: Program) -> Signature:
        """The signature as it stands."""
        results: list[object] = []
        fx.map_arg(program.graph.output_node().args, lambda n: results.append(n.meta.get("val")))
        given = (n for n in program.graph.nodes if n.op == "placeholder" and HELD not in n.meta)
        return Signature(tuple(results), tuple(n.name for n in given if n.name not in program.constants))

    def differs(self, other: Signature) -> str | None:
        """What changed, or None."""
        if self.inputs != other.inputs:
            return f"inputs {self.inputs} became {other.inputs}"
        if len(self.results) != len(other.results):
            return f"{len(self.results)} results became {len(other.results)}"
        for i, (a, b) in enumerate(zip(self.results, other.results, strict=True)):
            if isinstance(a, Tensor) != isinstance(b, Tensor):
                return f"result {i}: {a!r} became {b!r}"
            if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.dtype != b.dtype or not same_shape(a.shape, b.shape)):
                return f"result {i}: {a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}"
        return None


#: After which pass which operators must no longer read a dequantize.
_FUSED = (aten.linear.default, aten.embedding.default)


def verify(program: Program, after: str, before: Signature | None = None, fused: bool = False) -> None:
    """Raise a :class:`VerificationError` unless the program is whole.

    Args:
        after: name of the pass that ran last, for the message.
        before: the signature before it; the one now must be the same.
        fused: whether dequantizations must be fused by now.
    """

    def fail(what: str, node: fx.Node | None = None) -> None:
        where = "" if node is None else f" at {node.format_node()}"
        raise VerificationError(f"after {after}: {what}{where}")

    try:
        program.graph.lint()
    except RuntimeError as error:
        fail(str(error))
    if before is not None:
        change = before.differs(Signature.of(program))
        if change is not None:
            fail(change)
    placeholders = {n.name for n in program.graph.nodes if n.op == "placeholder"}
    for name in program.constants:
        if name not in placeholders:
            fail(f"constant {name} has no placeholder")
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in (
            qc.dequantize.default,
            qc.linear.default,
            qc.linear_split.default,
            qc.linear_quantized.default,
            qc.linear_quantized_split.default,
        ):
            _check_quantized(program, node, fail)
        if fused and node.op == "call_function" and node.target in _FUSED:
            for source in node.all_input_nodes:
                if source.target is qc.dequantize.default and source.meta["val"].dtype == node.meta["val"].dtype:
                    fail("a dequantization was not fused", node)


def _check_quantized(program: Program, node: fx.Node, fail: Any) -> None:
    args = normalized(node)
    parts = [args.get(k) for k in ("data", "scale", "zero")]
    for name, part in zip(("data", "scale", "zero"), parts, strict=True):
        if part is not None and program.constant(part) is None:
            fail(f"the {name} of a quantized weight is no constant", node)
    values: list[Any] = [None if p is None else p.meta["val"] for p in parts]
    try:
        check_parts(values[0], values[1], values[2], Scheme.parse(args["scheme"]), args["shape"])
    except ValueError as error:
        fail(str(error), node)
