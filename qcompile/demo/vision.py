"""The image classifier of the demo: a small convolutional network, trained here on MNIST's digits, then quantized."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompile.demo import data
from qcompile.demo.progress import Progress, bar
from qcompile.demo.table import table
from qcompile.demo.variants import VARIANTS, Variant

__all__ = ["DigitNet", "VisionResult", "run", "show", "train"]


@dataclass(frozen=True)
class VisionResult:
    """One variant: accuracy on the held-out digits, the share of them classed as by float, images a second."""

    name: str
    accuracy: float
    agreement: float
    rate: float


class DigitNet(nn.Module):
    """Two convolutions with pooling and two linear layers: float ``[n, 1, 28, 28]`` to logits ``[n, 10]``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classify = nn.Sequential(nn.Flatten(), nn.Linear(2 * width * 49, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of each class."""
        return self.classify(self.features(images))


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    progress: Progress,
    epochs: int = 5,
    batch: int = 64,
    rate: float = 2e-3,
) -> None:
    """Fit the model with AdamW and one cosine of the learning rate; it is in eval mode afterwards.

    Args:
        images, labels: float ``[n, 1, 28, 28]`` and int64 ``[n]``.
        progress: told of each epoch.
        rate: the learning rate at the start.
    """
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.update()
    model.eval()


def run(
    *,
    variants: Sequence[Variant] = (VARIANTS[0], *VARIANTS[2:]),
    epochs: int = 5,
    held_out: int = 2000,
    batch: int = 100,
) -> list[VisionResult]:
    """Train the network on all digits but ``held_out`` and measure each variant on those.

    Args:
        variants: what to compare; the first is what agreement is taken against.
        epochs: of training.
        held_out: how many digits to test on.
        batch: images in one call; must divide ``held_out``.
    """
    if held_out % batch:
        raise ValueError(f"batch is {batch}, which does not divide held_out, {held_out}")
    pixels, classes = data.mnist()
    images, labels = torch.from_numpy(pixels)[:, None], torch.from_numpy(classes)
    torch.manual_seed(0)
    model = DigitNet()
    results: list[VisionResult] = []
    reference: Tensor | None = None
    with bar(epochs + len(variants), "image classifier") as progress:
        progress.set_postfix_str("train")
        train(model, images[held_out:], labels[held_out:], progress, epochs)
        for variant in variants:
            progress.set_postfix_str(variant.name)
            # A copy each: the float weights of a compiled model may be given up.
            classify = variant.compile(copy.deepcopy(model))
            predicted, seconds = [], []
            for start in range(0, held_out, batch):
                begin = time.perf_counter()
                with torch.no_grad():
                    predicted.append(classify(images[start : start + batch].clone()).argmax(1))
                seconds.append(time.perf_counter() - begin)
            found = torch.cat(predicted)
            reference = found if reference is None else reference
            steady = seconds[1:] or seconds  # the first call compiles
            results.append(
                VisionResult(
                    variant.name,
                    float((found == labels[:held_out]).float().mean()),
                    float((found == reference).float().mean()),
                    batch * len(steady) / sum(steady),
                )
            )
            progress.update()
        progress.set_postfix_str("")
    return results


def show(results: Sequence[VisionResult]) -> str:
    """The results as a table of text."""
    rows = [[r.name, f"{r.accuracy:.2%}", f"{r.agreement:.2%}", f"{r.rate:,.0f}"] for r in results]
    return table(["variant", "accuracy", f"same class as {results[0].name}", "images/s"], rows)
