"""From a kernel's packed operators back to logical ones: what a quantized eager module puts into a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qcompile.kernels.dispatch import Kernel, Packed, kernels
from qcompile.kernels.dtypes import QType, qtypes
from qcompile.kernels.layouts.tiled import TILE
from qcompile.kernels.memory import Meter
from qcompile.kernels.ops._planes import KINDS
from qcompile.kernels.qtensor import QTensor, write_rows
from qcompile.kernels.scheme import Granularity, Mode, PerChannel, PerGroup, Scheme
from qcompile.passes.base import Pass
from qcompile.passes.lift import weight_name
from qcompile.passes.program import Constant, Original, Program, normalized, value
from qcompile.passes.quantize_weights import insert
from qcompile.passes.select import DEFAULT_GROUP

aten = torch.ops.aten
qc = torch.ops.qcompile

#: Elements that are unpacked at a time.
_SLICE = 1 << 20


@dataclass(frozen=True)
class _Layout:
    """The operators of a layout, and how many rows of the weight a row of its codes holds."""

    linears: tuple[torch._ops.OpOverload, ...]
    embedding: torch._ops.OpOverload
    dequantize: torch._ops.OpOverload
    rows: int

    @property
    def kernel(self) -> Kernel:
        """The one that says how the layout is unpacked; all its operators share it."""
        return next(k for k in kernels("linear") if k.target is self.linears[0] and k.unpack is not None)


_TILED = _Layout(
    (qc.linear_tiled.default, qc.linear_tiled_forward.default, qc.linear_tiled_forward.plain), qc.embedding_tiled.default,
    qc.dequantize_tiled.default, TILE,
)  # fmt: skip
_PLANES = _Layout(
    (qc.linear_planes.default, qc.linear_planes_forward.default), qc.embedding_planes.default,
    qc.dequantize_planes.default, 1,
)  # fmt: skip
#: The operators that are rewritten, each with its layout.
PACKED: dict[object, _Layout] = {
    op: one for one in (_TILED, _PLANES) for op in (*one.linears, one.embedding, one.dequantize)
}

#: What an epilogue's arguments are where there is none; a linear with one stays as it is.
_PLAIN = {"activation": "none", "mul": None, "add": None, "glu": False, "exact": False}


@dataclass(frozen=True)
class Unpack(Pass):
    """Turn operators on packed constants back into logical ones, on codes that are unpacked once::

        linear_tiled(x, codes, scale, zero, bias, …)  ->  linear(x, dequantize(data, scale, zero, scheme), bias)
        embedding_tiled(i, codes, scale, zero, …)     ->  embedding(dequantize(data, scale, zero, scheme), i)
        dequantize_tiled(codes, scale, zero, …)       ->  dequantize(data, scale, zero, scheme)

    and likewise those of the ``planes`` layout, which modules on NVIDIA and AMD GPUs hold.

    So a module that was quantized before it was captured gives the graph that quantizing the float module gives, and its
    siblings and epilogues are fused as there. The scheme is what the layout says.

    Before: any graph. After: no operator with a plain epilogue reads a packed constant. The packed tensors are remembered
    (``program.originals``), for :class:`~qcompile.passes.pack.Pack` to use again instead of packing anew.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many operators were rewritten."""
        made: dict[tuple[object, ...], fx.Node] = {}
        count, meter = 0, Meter()
        nodes = program.calls(*PACKED)
        for node in program.track(nodes, "unpacking") if nodes else ():
            weight = _weight(program, node)
            if weight is None:
                continue
            if weight.key not in made:
                made[weight.key] = _dequantized(program, weight, made)
                meter.add(weight.rows * weight.cols)
            _replace(program, node, made[weight.key])
            count += 1
        program.clean()
        return count


@dataclass(frozen=True)
class _Weight:
    """A packed weight as an operator reads it; kind: as the planes layout calls what a byte is, None in other layouts."""

    layout: _Layout
    codes: Constant
    scale: Constant
    zero: Constant | None
    bits: int
    kind: str | None
    group_size: int
    rows: int
    cols: int
    dtype: torch.dtype

    @property
    def stored(self) -> tuple[object, ...]:
        """Equal for two reads of the same values; a tied weight may have two placeholders, and has one tensor."""
        tensors = (self.codes.tensor, self.scale.tensor, None if self.zero is None else self.zero.tensor)
        return (*map(id, tensors), self.bits, self.kind, self.group_size, self.rows, self.cols)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two reads that one dequantize serves."""
        return (*self.stored, self.dtype)

    @property
    def packed(self) -> Packed:
        """As its kernel wants it."""
        tensors = (self.codes.tensor, self.scale.tensor, None if self.zero is None else self.zero.tensor)
        sizes = {"bits": self.bits, "group_size": self.group_size, "rows": self.rows, "cols": self.cols}
        return Packed(tensors, sizes if self.kind is None else {**sizes, "kind": KINDS.index(self.kind)})

    @property
    def qtype(self) -> QType:
        """The quantized dtype of the codes."""
        if self.kind is not None:
            return qtypes[f"qint{self.bits}" if self.kind == "int" else f"qfloat8_{self.kind.removeprefix('finite_')}"]
        dtype = self.codes.tensor.dtype
        return qtypes[f"qint{self.bits}" if dtype == torch.uint8 else f"q{str(dtype).removeprefix('torch.')}"]

    @property
    def scheme(self) -> Scheme:
        """The scheme that the layout stands for, as :class:`~qcompile.passes.select.Select` would name it."""
        mode: Mode = "symmetric"
        if self.zero is not None:
            mode = "affine" if self.zero.tensor.dtype == torch.uint8 else "shift"
        size = self.group_size or self.cols
        granularity: Granularity = PerGroup(size)
        if not self.group_size and self.bits == 8 and (self.qtype.is_float or self.cols > DEFAULT_GROUP):
            granularity = PerChannel(0)
        return Scheme(self.qtype, granularity, mode, self.scale.tensor.dtype)


def _weight(program: Program, node: fx.Node) -> _Weight | None:
    """The weight that a packed operator reads; None where the operator has to stay as it is."""
    args = normalized(node)
    codes, scale = program.constant(args["codes"]), program.constant(args["scale"])
    zero = program.constant(args["zero"])
    if codes is None or scale is None or (zero is None) != (args["zero"] is None):
        return None
    if any(c is not None and (c.mutated or c.receives_grad) for c in (codes, scale, zero)):
        return None
    layout = PACKED[node.target]
    if node.target in layout.linears:
        rows, cols, dtype = args["out_features"], value(args["x"]).shape[-1], value(args["x"]).dtype
        if any(args.get(name, plain) != plain for name, plain in _PLAIN.items()):
            return None
    elif node.target is layout.embedding:
        rows, cols, dtype = args["num_embeddings"], args["embedding_dim"], args["dtype"]
    else:
        rows, cols, dtype = args.get("rows", codes.tensor.shape[0]), args["cols"], args["dtype"]
    # A stack of siblings or a gate and its up projection, asked for in packed order, is no matrix of the user's.
    if not isinstance(cols, int) or -(-rows // layout.rows) != codes.tensor.shape[0]:
        return None
    return _Weight(layout, codes, scale, zero, args["bits"], args.get("kind"), args["group_size"], rows, cols, dtype)


def _dequantized(program: Program, weight: _Weight, made: dict[tuple[object, ...], fx.Node]) -> fx.Node:
    """Add the logical constants and their dequantize; a second dtype reads the constants of the first."""
    first = made.get(weight.stored)
    if first is not None:
        with program.graph.inserting_before(program.first_call()):
            return program.call(qc.dequantize.default, *first.args[:5], weight.dtype)
    kernel = weight.layout.kernel
    held = [c.identity for c in (weight.codes, weight.scale, weight.zero) if c is not None]
    identity = None if None in held else ("packed here", *held, *weight.stored[3:])
    key = None if identity is None else ("unpacked", *identity)
    if key is None or key not in program.memo:
        quantized = _unpacked(kernel, weight)
        if key is not None:
            program.memo[key] = (quantized, None)
    else:
        # An earlier graph had it; where only its shapes are left, what was packed of it may be all that is needed.
        quantized, _ = program.memo[key]
    constant = Constant(weight_name(weight.codes.name), weight.codes.tensor, is_parameter=False, identity=identity)
    node = made[weight.stored] = insert(program, constant, quantized, weight.dtype, "unpacked")
    program.originals[normalized(node)["data"].name] = Original(kernel.pack, weight.packed)
    return node


def _unpacked(kernel: Kernel, weight: _Weight) -> QTensor:
    """The logical value, unpacked in slices of whole rows of codes, so that little more than the result is ever held."""
    scheme = weight.scheme
    whole = QTensor.empty(scheme, (weight.rows, weight.cols), weight.codes.tensor.device)
    unit = weight.layout.rows
    step = max(1, _SLICE // max(1, unit * weight.cols))
    for first in range(0, weight.codes.tensor.shape[0], step):
        start, end = first * unit, min((first + step) * unit, weight.rows)
        tensors = [None if t is None else t.detach()[first : first + step] for t in weight.packed.tensors]
        part = Packed(tuple(tensors), {**weight.packed.sizes, "rows": end - start})
        write_rows(whole, start, kernel.unpack(part, scheme, (end - start, weight.cols), None, False))  # type: ignore[misc]
    return whole


def _replace(program: Program, node: fx.Node, weight: fx.Node) -> None:
    args = normalized(node)
    with program.graph.inserting_before(node):
        layout = PACKED[node.target]
        if node.target in layout.linears:
            bias = args["bias"]
            if bias is not None and value(bias).dtype != value(node).dtype:
                bias = program.call(aten.to.dtype, bias, value(node).dtype, like=node)
            new = program.call(aten.linear.default, args["x"], weight, bias, like=node)
        elif node.target is layout.embedding:
            new = program.call(aten.embedding.default, weight, args["indices"], like=node)
        else:
            new = weight
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
