"""Modules that hold packed or logical quantized weights, as any caller of the operators may write them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.dispatch import kernels
from qcompile.kernels.dtypes import qtype
from qcompile.kernels.ops.conv import rows_of, weight_of
from qcompile.passes.select import Select

ops = torch.ops.qcompile


def packed_parts(q: QTensor) -> tuple[tuple[Tensor | None, ...], tuple[int, int]]:
    """Codes, scale and zero point of a matrix in the kernels' layout; bits and group size."""
    kernel = next(k for k in kernels("linear") if k.target is ops.linear_tiled.default)
    made = kernel.pack(q, None, False)
    return made.tensors, (made.sizes["bits"], made.sizes["group_size"])


class Weight(nn.Module):
    """A quantized matrix in buffers, packed or logical; calling it decodes it."""

    def __init__(self, matrix: Tensor, scheme: Scheme, packed: bool) -> None:
        super().__init__()
        q = QTensor.quantize(matrix.detach(), scheme)
        self.shape, self.dtype, self.scheme, self.packed = list(q.shape), matrix.dtype, str(scheme), packed
        parts: tuple[Tensor | None, ...] = (q.data, q.scale, q.zero)
        if packed:
            parts, self.sizes = packed_parts(q)
        for name, part in zip(("codes" if packed else "_data", "scale", "zero"), parts, strict=True):
            self.register_buffer(name, part)

    def forward(self) -> Tensor:
        if self.packed:
            return ops.dequantize_tiled(self.codes, self.scale, self.zero, *self.sizes, *self.shape, self.dtype)
        return ops.dequantize(self._data, self.scale, self.zero, self.scheme, self.shape, self.dtype)


class Linear(nn.Module):
    """A linear on a quantized weight; with ``activations``, on a rounded input."""

    def __init__(self, of: nn.Linear, scheme: Scheme, packed: bool, activations: float | str | None = None) -> None:
        super().__init__()
        self.weight, self.bias = Weight(of.weight, scheme, packed), of.bias
        self.activations = activations
        if isinstance(activations, float):
            self.register_buffer("input_scale", torch.tensor(activations))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if isinstance(self.activations, float):
            x = ops.fake_quantize(x, self.input_scale, "qint8")
        elif self.activations:
            x = ops.fake_quantize_dynamic(x, self.activations)
        if w.packed:
            return ops.linear_tiled(x, w.codes, w.scale, w.zero, self.bias, *w.sizes, w.shape[0])
        return nn.functional.linear(x, w(), self.bias)


class Embedding(nn.Module):
    """A lookup in a quantized table."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, indices: Tensor) -> Tensor:
        w = self.weight
        if w.packed:
            return ops.embedding_tiled(indices, w.codes, w.scale, w.zero, *w.sizes, *w.shape, w.dtype)
        return nn.functional.embedding(indices, w())


class Conv(nn.Module):
    """A convolution whose kernel is decoded, then reshaped."""

    def __init__(self, of: Any, scheme: Scheme, packed: bool) -> None:
        super().__init__()
        self.transposed = isinstance(of, nn.ConvTranspose2d)
        rows = rows_of(of.weight.detach(), self.transposed, of.groups)
        self.weight, self.bias, self.groups, self.shape = Weight(rows, scheme, packed), of.bias, of.groups, of.weight.shape
        self.rest = {"stride": of.stride, "padding": of.padding}

    def forward(self, x: Tensor) -> Tensor:
        kernel = weight_of(self.weight(), self.shape, self.transposed, self.groups)
        call = nn.functional.conv_transpose2d if self.transposed else nn.functional.conv2d
        return call(x, kernel, self.bias, groups=self.groups, **self.rest)


def with_codes(model: nn.Module, weights: str = "qint8", packed: bool = True, **more: Any) -> nn.Module:
    """A copy of ``model`` whose linears, convolutions and embeddings hold codes, as quantizing its graph would make them."""
    select = Select(weights=qtype(weights))
    model = copy.deepcopy(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    held: dict[int, Weight] = {}
    for path, child in list(model.named_modules()):
        owner, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if isinstance(child, nn.Embedding):
            held[id(child.weight)] = Weight(child.weight, select.scheme_for(child.weight.shape, True), packed)
            setattr(owner, name, Embedding(held[id(child.weight)]))
        elif isinstance(child, nn.Linear):
            made = Linear(child, select.scheme_for(child.weight.shape, id(child.weight) in tables), packed, **more)
            made.weight = held.get(id(child.weight), made.weight)
            setattr(owner, name, made)
        elif isinstance(child, nn.Conv2d | nn.ConvTranspose2d):
            rows = rows_of(child.weight, isinstance(child, nn.ConvTranspose2d), child.groups)
            setattr(owner, name, Conv(child, select.scheme_for(rows.shape, conv=True), packed))
    return model
