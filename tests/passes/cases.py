"""Toy modules, one for each way of writing a product with a weight, and what the report must say of it.

The same list is run through every front end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = tuple[str, str, tuple[int, ...]]


class Lambda(nn.Module):
    """A module with parameters ``w0``, ``w1``, … of the given shapes, and a forward that is a function of them."""

    def __init__(self, forward: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            setattr(self, f"w{i}", nn.Parameter(torch.randn(shape)))
        self.apply_ = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.apply_(*inputs, *self._parameters.values())


class Conv1D(nn.Module):
    """A linear layer that stores its weight transposed, ``[in, out]``, and flattens its input."""

    def __init__(self, features: int, columns: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.randn(columns, features))
        self.bias = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.features)


class OwnForward(nn.Linear):
    """A subclass of ``nn.Linear`` whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * 2, self.weight, self.bias) + 1


class Routed(nn.Module):
    """Experts in one 3-d parameter, each row of the input multiplied with the one that a router chose."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, 16, 24))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        return torch.bmm(x.unsqueeze(1), self.experts[chosen]).squeeze(1)


class Tied(nn.Module):
    """A table and a head that are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids) * 2)


class TwoNames(nn.Module):
    """One module reachable by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Attention(nn.Module):
    """Self-attention over ``nn.MultiheadAttention``; queries, keys and values may differ."""

    def __init__(self, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.cross = cross
        self.mha = nn.MultiheadAttention(32, 4, batch_first=True, **options)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        other = memory if self.cross else x
        return self.mha(x, other, other, need_weights=False)[0]


class First(nn.Module):
    """The first result of a module that gives several."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)[0]


@dataclass(frozen=True)
class Case:
    """A module, its inputs, and what must be quantized.

    Attributes:
        name: of the test.
        model: makes the module.
        inputs: shapes of random float inputs, or tensors as they are.
        rows: kind, weight and shape of each quantized row, in graph order.
        ops: how often operators stand in the quantized graph.
        alone: kind, weight and reason of each row that is left alone.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    rows: tuple[Row, ...]
    ops: dict[str, int] = field(default_factory=dict)
    alone: tuple[tuple[str, str, str], ...] = ()

    def make(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The module in evaluation mode, and inputs with a few outliers."""
        generator = torch.Generator().manual_seed(1)
        inputs = []
        for given in self.inputs:
            if isinstance(given, Tensor):
                inputs.append(given)
            else:
                x = torch.randn(given, generator=generator)
                inputs.append(torch.where(torch.rand(given, generator=generator) < 0.02, 5 * x, x))
        return self.model().eval().requires_grad_(False), tuple(inputs)


def _of(forward: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: Lambda(forward, *shapes)


def _linear(name: str, forward: Callable[..., Any], x: tuple[int, ...], w: tuple[int, ...], row: tuple[int, ...]) -> Case:
    return Case(name, _of(forward, w), (x,), (("linear", "w0", row),), {"qcompile.linear": 1})


def _einsum(equation: str, x: tuple[int, ...], w: tuple[int, ...], row: tuple[int, ...], swap: bool = False) -> Case:
    kind = "linear" if len(row) == 2 else "grouped_linear"

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(equation, b, a) if swap else torch.einsum(equation, a, b)

    return Case(f"einsum {equation}", _of(forward, w), (x,), ((kind, "w0", row),), {f"qcompile.{kind}": 1})


def _conv(name: str, make: Callable[[], nn.Module], x: tuple[int, ...], row: tuple[int, int]) -> Case:
    return Case(name, make, (x,), (("conv", "weight", row),), {"qcompile.conv": 1})


_BOTH = "both operands are activations"

LINEARS = (
    Case("root linear", lambda: nn.Linear(33, 7), ((5, 33),), (("linear", "weight", (7, 33)),), {"qcompile.linear": 1}),
    Case(
        "linears", lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False)), ((2, 3, 16),),
        (("linear", "0.weight", (24, 16)), ("linear", "2.weight", (8, 24))), {"qcompile.linear": 2},
    ),
    Case("own forward", lambda: nn.Sequential(OwnForward(16, 8)), ((3, 16),), (("linear", "0.weight", (8, 16)),)),
    Case("transposed storage", lambda: Conv1D(24, 16), ((2, 3, 16),), (("linear", "weight", (24, 16)),)),
    _linear("F.linear", lambda x, w: F.linear(x, w), (3, 16), (8, 16), (8, 16)),
    _linear("F.linear of a vector", lambda x, w: F.linear(x, w), (16,), (8, 16), (8, 16)),
    Case("F.linear and bias", _of(F.linear, (8, 16), (8,)), ((3, 16),), (("linear", "w0", (8, 16)),)),
    _linear("x @ w", lambda x, w: x @ w, (3, 16), (16, 8), (8, 16)),
    _linear("x @ w.T", lambda x, w: x @ w.T, (3, 16), (8, 16), (8, 16)),
    _linear("w @ x", lambda x, w: w @ x, (16, 3), (8, 16), (8, 16)),
    _linear("w @ vector", lambda x, w: w @ x, (16,), (8, 16), (8, 16)),
    _linear("mv", lambda x, w: torch.mv(w, x), (16,), (8, 16), (8, 16)),
    _linear("matmul 1-d", lambda x, w: torch.matmul(x, w), (16,), (16, 8), (8, 16)),
    _linear("matmul 2-d", lambda x, w: torch.matmul(x, w), (3, 16), (16, 8), (8, 16)),
    _linear("matmul 3-d", lambda x, w: torch.matmul(x, w), (2, 3, 16), (16, 8), (8, 16)),
    _linear("matmul 4-d", lambda x, w: torch.matmul(x, w), (2, 2, 3, 16), (16, 8), (8, 16)),
    _linear("w @ 3-d", lambda x, w: torch.matmul(w, x), (2, 16, 3), (8, 16), (8, 16)),
    _linear("mm", lambda x, w: torch.mm(x, w), (3, 16), (16, 8), (8, 16)),
    _linear("addmm", lambda x, w: torch.addmm(torch.ones(8), x, w), (3, 16), (16, 8), (8, 16)),
    _linear("addmm scaled", lambda x, w: torch.addmm(x[:, :8], x, w, beta=0.5, alpha=2), (3, 16), (16, 8), (8, 16)),
    _linear("addmm swapped", lambda x, w: torch.addmm(torch.ones(3), w, x), (16, 3), (8, 16), (8, 16)),
    Case("slice", _of(lambda x, w: F.linear(x, w[:, :16]), (8, 32)), ((3, 16),), (("linear", "w0[:, 0:16]", (8, 16)),)),
    Case("last rows", _of(lambda x, w: x @ w[-8:].T, (24, 16)), ((3, 16),), (("linear", "w0[-8:]", (8, 16)),)),
    Case(
        "chunk", _of(lambda x, w: [x @ part.T for part in w.chunk(3)], (24, 16)), ((3, 16),),
        tuple(("linear", f"w0[part {i}]", (8, 16)) for i in range(3)), {"qcompile.linear": 3},
    ),
    Case(
        "used twice", _of(lambda x, w: F.linear(F.linear(x, w).relu(), w), (16, 16)), ((3, 16),),
        (("linear", "w0", (16, 16)),) * 2, {"qcompile.linear": 2},
    ),
    Case("two names", TwoNames, ((3, 16),), (("linear", "second.weight", (16, 16)),) * 2, {"qcompile.linear": 2}),
)  # fmt: skip

EINSUMS = (
    _einsum("bsd,dk->bsk", (2, 3, 16), (16, 8), (8, 16)),
    _einsum("bsd,kd->bsk", (2, 3, 16), (8, 16), (8, 16)),
    _einsum("bsd,kd->kbs", (2, 3, 16), (8, 16), (8, 16)),
    _einsum("dk,bsd->bsk", (2, 3, 16), (16, 8), (8, 16), swap=True),
    _einsum("...d,dk->...k", (2, 2, 3, 16), (16, 8), (8, 16)),
    _einsum("...d,dhk->...hk", (2, 3, 16), (16, 4, 8), (32, 16)),
    _einsum("bshk,hkd->bsd", (2, 3, 4, 8), (4, 8, 16), (16, 32)),
    _einsum("bsd,dhk", (2, 3, 16), (16, 4, 8), (32, 16)),
    _einsum("b c h w , c o -> b o h w", (2, 16, 3, 5), (16, 8), (8, 16)),
    _einsum("ebd,edf->ebf", (4, 3, 16), (4, 16, 8), (4, 8, 16)),
    _einsum("bed,efd->bef", (3, 4, 16), (4, 8, 16), (4, 8, 16)),
    _einsum("bshd,hdk->bhsk", (2, 3, 4, 16), (4, 16, 8), (4, 8, 16)),
)

GROUPED = (
    Case(
        "bmm", _of(torch.bmm, (4, 16, 8)), ((4, 3, 16),), (("grouped_linear", "w0", (4, 8, 16)),),
        {"qcompile.grouped_linear": 1},
    ),
    Case(
        "matmul with a stack", _of(torch.matmul, (4, 16, 8)), ((2, 4, 3, 16),), (("grouped_linear", "w0", (4, 8, 16)),),
        {"qcompile.grouped_linear": 1},
    ),
    Case(
        "stack @ x", _of(lambda x, w: w @ x, (4, 8, 16)), ((4, 16, 3),), (("grouped_linear", "w0", (4, 8, 16)),),
        {"qcompile.grouped_linear": 1},
    ),
    Case(
        "matmul, one x for all", _of(torch.matmul, (4, 16, 8)), ((3, 16),), (("linear", "w0", (32, 16)),),
        {"qcompile.linear": 1},
    ),
    Case(
        "baddbmm", _of(lambda x, w: torch.baddbmm(x[:, :, :8], x, w, beta=2), (4, 16, 8)), ((4, 3, 16),),
        (("grouped_linear", "w0", (4, 8, 16)),),
    ),
    Case(
        "grouped_mm",
        _of(
            lambda x, offsets, w: F.grouped_mm(x.bfloat16(), w.bfloat16(), offs=offsets), (4, 16, 8)
        ),
        ((12, 16), torch.tensor([3, 3, 8, 12], dtype=torch.int32)), (("grouped_linear", "w0", (4, 8, 16)),),
        {"qcompile.grouped_linear": 1},
    ),
    Case("one expert", _of(lambda x, w: x @ w[2], (4, 16, 8)), ((3, 16),), (("linear", "w0[2]", (8, 16)),)),
    Case(
        "each expert", _of(lambda x, w: sum(x @ w[i] for i in range(3)), (3, 16, 8)), ((3, 16),),
        tuple(("linear", f"w0[{i}]", (8, 16)) for i in range(3)), {"qcompile.linear": 3},
    ),
    Case(
        "routed", Routed, ((5, 16),), (("linear", "router.weight", (4, 16)), ("embedding", "experts", (4, 16, 24))),
        {"qcompile.embedding": 1}, (("matmul", "", _BOTH),),
    ),
)  # fmt: skip

CONVOLUTIONS = (
    _conv("conv1d", lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 10), (12, 24)),
    _conv("conv1d unbatched", lambda: nn.Conv1d(8, 12, 3), (8, 10), (12, 24)),
    _conv("conv1d same", lambda: nn.Conv1d(8, 12, 4, padding="same"), (2, 8, 10), (12, 32)),
    _conv("conv2d", lambda: nn.Conv2d(8, 12, (3, 2), stride=2, padding=(1, 0), bias=False), (2, 8, 9, 9), (12, 48)),
    _conv("conv2d same", lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2), (2, 8, 9, 9), (12, 72)),
    _conv("conv2d valid", lambda: nn.Conv2d(8, 12, 3, padding="valid"), (2, 8, 9, 9), (12, 72)),
    _conv("conv2d groups", lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 9, 9), (12, 18)),
    _conv("conv2d depthwise", lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9), (8, 9)),
    _conv("conv2d circular", lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 9, 9), (12, 72)),
    _conv("conv3d", lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1)), (2, 4, 4, 5, 5), (6, 32)),
    _conv("conv_transpose1d", lambda: nn.ConvTranspose1d(8, 12, 3, stride=2, output_padding=1), (2, 8, 7), (12, 24)),
    _conv("conv_transpose1d groups", lambda: nn.ConvTranspose1d(8, 12, 3, groups=2), (2, 8, 7), (12, 12)),
    _conv("conv_transpose2d", lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4), (2, 8, 5, 5), (12, 18)),
    _conv("conv_transpose3d", lambda: nn.ConvTranspose3d(4, 6, 2, dilation=2), (1, 4, 3, 3, 3), (6, 32)),
)

_IDS = torch.tensor([[0, 3, 39], [7, 7, 1]])

TABLES = (
    Case(
        "embedding", lambda: nn.Embedding(40, 16), (_IDS,), (("embedding", "weight", (40, 16)),),
        {"qcompile.embedding": 1},
    ),
    Case("embedding padded", lambda: nn.Embedding(40, 16, padding_idx=0), (_IDS,), (("embedding", "weight", (40, 16)),)),
    Case(
        "w[ids]", _of(lambda i, w: w[i], (40, 16)), (_IDS - 5,), (("embedding", "w0", (40, 16)),),
        {"qcompile.embedding": 1},
    ),
    Case(
        "index_select", _of(lambda i, w: torch.index_select(w, 0, i), (40, 16)), (_IDS[0],), (("embedding", "w0", (40, 16)),)
    ),
    Case(
        "tied", Tied, (_IDS,), (("embedding", "head.weight", (40, 16)), ("linear", "head.weight", (40, 16))),
        {"qcompile.embedding": 1, "qcompile.linear": 1},
    ),
)  # fmt: skip

MODULES = (
    Case(
        "self attention", Attention, ((2, 5, 32), (2, 7, 32)),
        (("linear", "mha.in_proj_weight", (96, 32)), ("linear", "mha.out_proj.weight", (32, 32))),
    ),
    Case(
        "cross attention", lambda: Attention(cross=True), ((2, 5, 32), (2, 7, 32)),
        (
            ("linear", "mha.in_proj_weight[part 0]", (32, 32)), ("linear", "mha.in_proj_weight[part 1]", (64, 32)),
            ("linear", "mha.out_proj.weight", (32, 32)),
        ),
    ),
    Case(
        "attention with own widths", lambda: Attention(cross=True, kdim=24, vdim=24), ((2, 5, 32), (2, 7, 24)),
        (
            *(("linear", f"mha.{n}_proj_weight", (32, k)) for n, k in (("q", 32), ("k", 24), ("v", 24))),
            ("linear", "mha.out_proj.weight", (32, 32)),
        ),
    ),
    Case(
        "lstm", lambda: First(nn.LSTM(16, 8, batch_first=True)), ((2, 5, 16),),
        (("rnn", "inner.weight_ih_l0", (32, 16)), ("rnn", "inner.weight_hh_l0", (32, 8))),
    ),
    Case(
        "gru in two directions", lambda: First(nn.GRU(16, 8, bidirectional=True)), ((5, 2, 16),),
        tuple(("rnn", f"inner.weight_{n}_l0{d}", (24, k)) for d in ("", "_reverse") for n, k in (("ih", 16), ("hh", 8))),
    ),
    Case(
        "rnn", lambda: First(nn.RNN(16, 8, num_layers=2)), ((5, 2, 16),),
        tuple(("rnn", f"inner.weight_{n}_l{i}", (8, k)) for i in (0, 1) for n, k in (("ih", 8 if i else 16), ("hh", 8))),
    ),
)  # fmt: skip

QUANTIZED = (*LINEARS, *EINSUMS, *GROUPED, *CONVOLUTIONS, *TABLES, *MODULES)
