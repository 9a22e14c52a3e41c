"""Small models for the tests of the front ends, and what they compute once their weights were rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile.kernels import QTensor
from qcompile.options import Options
from qcompile.passes.program import Constant


class Calls(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


class Mlp(nn.Module):
    """Two linears, large enough to be quantized by default."""

    def __init__(self, features: int = 64, hidden: int = 160) -> None:
        super().__init__()
        self.up = nn.Linear(features, hidden)
        self.down = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.up(x)))


class Cache(nn.Module):
    """A linear whose outputs are written into a buffer, one row a call, as a key-value cache is."""

    def __init__(self, features: int = 64, length: int = 6, persistent: bool = True) -> None:
        super().__init__()
        self.project = nn.Linear(features, features)
        self.register_buffer("seen", torch.zeros(length, features), persistent=persistent)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.seen.index_copy_(0, position, self.project(x))
        return self.seen.sum(0, keepdim=True)


class Tied(nn.Module):
    """A table and a head that share one weight."""

    def __init__(self, words: int = 160, features: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, features)
        self.head = nn.Linear(features, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(words)))


def rounded(model: nn.Module, weights: str = "qint8") -> nn.Module:
    """A copy of ``model`` with the float values that its quantized matrices stand for."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                scheme = Options.parse({"weights": weights}).select.scheme(Constant("", parameter), set())
                parameter.copy_(QTensor.quantize(parameter, scheme).dequantize())
    return model


def distance(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``, in float64; infinite where there is a NaN in ``got``."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm()) if bool(got.isfinite().all()) else float("inf")
