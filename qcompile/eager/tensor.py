"""What ``module.weight`` is once it is frozen: a tensor that has codes, and that products take as it is.

Code that is not a layer of its own (``F.linear`` with a raw parameter, ``x @ w``, experts that are picked one by one)
reaches the same kernels through it. Whatever else is done with it is done with its float value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from qcompile.eager.decoded import check_not_written, seen_through
from qcompile.eager.weight import QWeight
from qcompile.kernels.layouts.tiled import TILE

__all__ = ["WeightTensor"]

aten = torch.ops.aten
qc = torch.ops.qcompile


class WeightTensor(torch.Tensor):
    """A view of a :class:`QWeight`: all of it, or some of its rows, as it is or transposed.

    Operators are met below autograd, where a linear has become a transposition and a matrix product. Those are computed
    by the kernel that the weight is packed for; any other operator gets the float value, decoded for it and given up again.
    It cannot be written to.

    Attributes:
        source: the weight.
        rows: first and last row of its matrix (all matrices of a stack under each other), end exclusive.
        flipped: whether this is the transposed matrix.
    """

    source: QWeight
    rows: tuple[int, int]
    flipped: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(source: QWeight) -> WeightTensor:
        """The whole weight, in the parameter's shape."""
        return WeightTensor._make(source, source.shape, (0, _count(source)), source.arrangement.kind == "columns")

    @staticmethod
    def _make(source: QWeight, shape: Sequence[int], rows: tuple[int, int], flipped: bool) -> WeightTensor:
        made = torch.Tensor._make_wrapper_subclass(
            WeightTensor, list(shape), dtype=source.dtype, device=source.device, requires_grad=False
        )
        made.source, made.rows, made.flipped = source, rows, flipped
        return made

    def dequantize(self) -> Tensor:
        """The float value."""
        whole = (0, _count(self.source)) == self.rows and self.flipped == (self.source.arrangement.kind == "columns")
        if whole and self.shape == self.source.shape:
            return self.source.dequantize()
        matrix = self.source.matrix()
        rows = matrix.reshape(-1, matrix.shape[-1])[self.rows[0] : self.rows[1]]
        if self.dim() == 2:
            return rows.t() if self.flipped else rows
        stacked = rows.reshape(-1, *matrix.shape[1:])
        return stacked.transpose(-1, -2) if self.flipped else stacked

    @property
    def is_matrix(self) -> bool:
        """Whether it is rows of a matrix as products know it (not a convolution's kernel)."""
        return self.source.arrangement.kind in ("rows", "columns")

    def _transposed(self) -> WeightTensor:
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return WeightTensor._make(self.source, shape, self.rows, not self.flipped)

    def _part(self, start: int, stop: int, shape: Sequence[int], step: int = 1) -> WeightTensor:
        first = self.rows[0]
        return WeightTensor._make(self.source, shape, (first + start * step, first + stop * step), self.flipped)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """``x @ W.T + bias`` for the rows of this view, or None where no kernel computes it."""
        kernel = self.source.kernel()
        start, stop = self.rows
        whole = (start, stop) == (0, _count(self.source))
        if kernel is None or x.dtype != self.dtype or x.shape[-1] != self.source.arrangement.matrix_shape[-1]:
            return None  # where the operands do not fit, torch's own operator says so
        if whole:
            packed = self.source.packed()
            arguments = {
                "x": x, "bias": bias, "activation": "none", "mul": None, "add": None, "glu": False, "exact": False
            }  # fmt: skip
            return kernel.target(*kernel.arguments(packed.tensors, packed.sizes, arguments))
        if kernel.target is not qc.linear_tiled.default or start % TILE or (stop % TILE and stop != _count(self.source)):
            return None
        tiles = slice(start // TILE, -(-stop // TILE))
        codes, scale, zero = (None if t is None else t[tiles] for t in self.source.packed().tensors)
        sizes = self.source.packed().sizes
        return qc.linear_tiled(x, codes, scale, zero, bias, sizes["bits"], sizes["group_size"], stop - start)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WeightTensor(shape={list(self.shape)}, scheme='{self.source.scheme}', device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a frozen weight is saved with its module: use state_dict(), qcompile.save or pickle of the module")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._can_decompose():
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        check_not_written(func, args, kwargs, WeightTensor)
        args, kwargs = tree_map_only(WeightTensor, lambda w: w.dequantize(), (args, kwargs))
        return seen_through(func, func(*args, **kwargs))


def _count(source: QWeight) -> int:
    return math.prod(source.arrangement.matrix_shape[:-1])


def _linear(x: Any, w: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, WeightTensor) or not isinstance(w, WeightTensor) or w.flipped or w.dim() != 2 or not w.is_matrix:
        return NotImplemented
    result = w._product(x, bias)
    return NotImplemented if result is None else result


def _mm(x: Any, w: Any) -> Any:
    if isinstance(x, WeightTensor) or not isinstance(w, WeightTensor) or not w.flipped or w.dim() != 2 or x.dim() != 2:
        return NotImplemented
    result = w._product(x, None)
    return NotImplemented if result is None else result


def _addmm(bias: Tensor, x: Any, w: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(x, WeightTensor) or not isinstance(w, WeightTensor) or not w.flipped or (beta, alpha) != (1, 1):
        return NotImplemented
    if w.dim() != 2 or x.dim() != 2 or bias.dim() != 1 or bias.shape[0] != w.shape[1]:
        return NotImplemented
    result = w._product(x, bias)
    return NotImplemented if result is None else result


def _bmm(x: Any, w: Any) -> Any:
    if isinstance(x, WeightTensor) or not isinstance(w, WeightTensor) or not w.flipped:
        return NotImplemented
    if x.dim() != 3 or w.dim() != 3 or x.shape[0] != w.shape[0]:
        return NotImplemented
    pieces = []
    for i in range(w.shape[0]):
        piece = _select(w, 0, i)._product(x[i], None)
        if piece is None:
            return NotImplemented
        pieces.append(piece)
    return torch.stack(pieces) if pieces else NotImplemented


def _embedding(w: Any, indices: Tensor, padding_idx: int = -1, scale_grad: bool = False, sparse: bool = False) -> Any:
    if not isinstance(w, WeightTensor) or w.flipped or w.dim() != 2 or w.rows != (0, _count(w.source)):
        return NotImplemented
    kernel = w.source.kernel("embedding")
    if kernel is None:
        value = w.source.logical()
        text = str(value.scheme)
        return qc.embedding(indices, value.data, value.scale, value.zero, text, list(value.shape), w.dtype)
    packed = w.source.packed()
    return kernel.target(*kernel.arguments(packed.tensors, packed.sizes, {"indices": indices, "dtype": w.dtype}))


def _alias(w: Any, *args: Any, **kwargs: Any) -> Any:
    return WeightTensor._make(w.source, w.shape, w.rows, w.flipped) if isinstance(w, WeightTensor) else NotImplemented


def _same(w: WeightTensor, shape: Sequence[int], *, implicit: bool = False) -> Any:
    """Views and expansions to the shape that it has anyway, which batched products make on their way."""
    sizes = [own if size == -1 else size for own, size in zip(w.shape, shape, strict=False)]
    return _alias(w) if len(shape) == w.dim() and sizes == list(w.shape) else NotImplemented


def _unbind(w: WeightTensor, dim: int = 0) -> Any:
    pieces = [_select(w, dim, i) for i in range(w.shape[dim])]
    return NotImplemented if any(p is NotImplemented for p in pieces) else pieces


def _t(w: WeightTensor) -> Any:
    return w._transposed() if w.dim() == 2 and w.is_matrix else NotImplemented


def _transpose(w: WeightTensor, dim0: int, dim1: int) -> Any:
    if w.dim() < 2 or not w.is_matrix or {dim0 % w.dim(), dim1 % w.dim()} != {w.dim() - 2, w.dim() - 1}:
        return NotImplemented
    return w._transposed()


def _permute(w: WeightTensor, dims: Sequence[int]) -> Any:
    if not w.is_matrix or w.dim() < 2 or [d % w.dim() for d in dims] != [*range(w.dim() - 2), w.dim() - 1, w.dim() - 2]:
        return NotImplemented
    return w._transposed()


def _select(w: WeightTensor, dim: int, index: int) -> Any:
    if w.dim() < 3 or dim % w.dim() != 0 or not w.is_matrix or not -w.shape[0] <= index < w.shape[0]:
        return NotImplemented
    step = (w.rows[1] - w.rows[0]) // w.shape[0]
    index %= w.shape[0]
    return w._part(index, index + 1, w.shape[1:], step)


def _slice(w: WeightTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    flipped_rows = w.flipped and w.dim() == 2
    if dim % w.dim() != (1 if flipped_rows else 0) or step != 1 or not w.is_matrix:
        return NotImplemented
    size = w.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    if last <= first:
        return NotImplemented
    shape = list(w.shape)
    shape[dim] = last - first
    return w._part(first, last, shape, (w.rows[1] - w.rows[0]) // size)


def _split(w: WeightTensor, sizes: int | Sequence[int], dim: int = 0) -> Any:
    total = w.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - i) for i in range(0, total, sizes)] if sizes > 0 else []
    pieces, start = [], 0
    for size in sizes:
        piece = _slice(w, dim, start, start + size)
        if piece is NotImplemented:
            return NotImplemented
        pieces.append(piece)
        start += size
    return pieces


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten.embedding.default: _embedding,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.expand.default: _same,
    aten.view.default: _same,
    aten._unsafe_view.default: _same,
}
