"""Weights that were quantized before the graph was captured: constants that a dequantize gives back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from qcompile.kernels.scheme import PerChannel, PerGroup, Scheme
from qcompile.passes.program import Constant, Program, normalized

qc = torch.ops.qcompile


class UnfitError(Exception):
    """A quantized weight is read in an arrangement that its codes cannot be brought to."""


@dataclass(frozen=True)
class Stored:
    """A weight of which the program holds codes.

    Attributes:
        name: the user's name of it, and of the part that is meant.
        data, scale, zero: their placeholders; ``zero`` is None where the scheme is symmetric.
        scheme: text of the scheme.
        shape: of the weight whose codes they are.
        dtype: of the dequantized weight.
        start, rows: the part that is meant, counted in rows of the last axis; all of it from 0 on.
        part: the shape of that part.
    """

    name: str
    data: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    scheme: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    part: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the part's codes, scale and zero point."""
        return Scheme.parse(self.scheme).nbytes(self.part)

    @property
    def float_bytes(self) -> int:
        """Bytes of the part as a float tensor."""
        return math.prod(self.part) * self.dtype.itemsize


class Lifted:
    """Stand-ins: while the graph is canonicalized, each dequantize of constants is a constant itself.

    ``views.trace`` then finds it behind transposes, reshapes and casts like any float weight. The stand-in is a meta tensor:
    it has a shape and strides, and nothing is ever computed from its values. :meth:`lower` puts the dequantize back in its
    place; what reads it by then is in canonical form.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.stored: dict[str, Stored] = {}
        self.unfit: set[str] = set()
        made: dict[tuple[object, ...], fx.Node] = {}
        for node in program.calls(qc.dequantize.default):
            stored = _stored(program, node)
            if stored is None:
                continue
            parts = (stored.data, stored.scale, stored.zero)
            tensors = tuple(None if p is None else id(program.constants[p.name].tensor) for p in parts)
            key = (*tensors, stored.scheme, stored.shape, stored.dtype)
            if key not in made:
                made[key] = self._add(stored, node.meta["val"])
            node.replace_all_uses_with(made[key])
            program.graph.erase_node(node)

    def _add(self, stored: Stored, value: Tensor) -> fx.Node:
        stand_in = torch.empty(stored.part, dtype=stored.dtype, device="meta")
        node = self.program.add_constant(stored.name, stand_in)
        node.meta["val"] = value
        self.stored[node.name] = stored
        return node

    def view(self, node: fx.Node, name: str, arranged: Tensor, again: Callable[[Tensor], Tensor]) -> fx.Node:
        """The stand-in for a rearranged view of another one, if that is some rows of its codes.

        Args:
            node: the stand-in.
            name: what the view is called.
            arranged: the view of the stand-in's meta tensor.
            again: makes the same view of another tensor of its shape.

        Raises:
            UnfitError: the view's rows are not rows of the stored codes, or its scheme has no scale for each row.
        """
        stored, whole = self.stored[node.name], self.program.constants[node.name].tensor
        start = _offset(whole, arranged, again)
        by_row = isinstance(Scheme.parse(stored.scheme).granularity, PerGroup) or (
            Scheme.parse(stored.scheme).granularity == PerChannel(0) and len(stored.shape) == arranged.dim() == 2
        )
        columns = stored.shape[-1]
        if start is None or not by_row or arranged.shape[-1] != columns or start % columns:
            raise UnfitError
        if tuple(arranged.shape) == stored.part:
            return node
        part = replace(stored, name=name, start=stored.start + start // columns, part=tuple(arranged.shape))
        return self._add(part, node.meta["val"].new_empty(arranged.shape))

    def lower(self) -> None:
        """Put the dequantizations back, and drop the stand-ins."""
        program = self.program
        for name, stored in self.stored.items():
            node = next(n for n in program.graph.find_nodes(op="placeholder") if n.name == name)
            if node.users:
                parts = [self._rows(p, stored) for p in (stored.data, stored.scale, stored.zero)]
                with program.graph.inserting_before(program.first_call()):
                    arguments = (*parts, stored.scheme, list(stored.part), stored.dtype)
                    node.replace_all_uses_with(program.call(qc.dequantize.default, *arguments))
            program.drop_unread([node])

    def _rows(self, part: fx.Node | None, stored: Stored) -> fx.Node | None:
        """The constant that holds the part of codes, scale or zero point that belongs to the stored weight's part."""
        if part is None or stored.part == stored.shape:
            return part
        constant = self.program.constants[part.name]
        rows = math.prod(stored.part[:-1])
        # PerChannel: a matrix, and one scale a row.
        flat = constant.tensor if constant.tensor.dim() == 1 else constant.tensor.flatten(0, -2)
        chosen = flat[stored.start : stored.start + rows]
        chosen = chosen.reshape(*stored.part[:-1], *constant.tensor.shape[-1:]) if chosen.dim() > 1 else chosen
        where = (stored.start, *stored.part)
        identity = None if constant.identity is None else (*constant.identity, "rows", *where)
        name = f"{stored.name}_{constant.name.rpartition('_')[2]}"
        return self.program.add_constant(name, chosen, identity=identity)


def weight_name(name: str) -> str:
    """The user's name of a weight, from the name of the tensor that holds its codes."""
    # The eager modules hold the codes of `weight` in a module `q_weight` beside it.
    child = re.sub(r"(^|\.)q_(\w+)\._(data|scale|zero|codes)$", r"\1\2", name)
    return child if child != name else re.sub(r"[._]+(data|scale|zero|codes|packed_\d+)$", "", name) or name


def _stored(program: Program, node: fx.Node) -> Stored | None:
    """What a dequantize reads, if all of it is constant."""
    args = normalized(node)
    held: list[Constant | None] = [program.constant(args[k]) for k in ("data", "scale", "zero")]
    given = [k for k in ("data", "scale", "zero") if args[k] is not None]
    found = [c for c in held if c is not None]
    shape = tuple(args["shape"])
    if len(found) != len(given) or any(c.mutated for c in found) or not all(isinstance(s, int) for s in shape):
        return None
    name = weight_name(program.constants[args["data"].name].name)
    return Stored(name, args["data"], args["scale"], args["zero"], args["scheme"], shape, args["dtype"], 0, shape)


def _offset(whole: Tensor, view: Tensor, again: Callable[[Tensor], Tensor]) -> int | None:
    """Where in ``whole`` the elements of ``view`` stand one after the other; None where they do not."""
    if view.untyped_storage()._cdata == whole.untyped_storage()._cdata:
        return int(view.storage_offset()) if view.is_contiguous() else None
    # A copy: follow the elements by their numbers.
    places = again(torch.arange(whole.numel()).view(whole.shape)).reshape(-1)
    start = int(places[0]) if places.numel() else 0
    return start if torch.equal(places, torch.arange(start, start + places.numel())) else None
