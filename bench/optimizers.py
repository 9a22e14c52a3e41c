"""How well ``max``, ``mse`` and ``hqq`` find scales, on real and on heavy-tailed weights; prints a markdown table.

    python bench/optimizers.py                                   # random weights, and the models that `make demo` fetched
    python bench/optimizers.py --file model.safetensors --tensors 4 --schemes group=32/symmetric/float16

Columns, each the mean over a source's weights: the relative error of the weight in l2; the l_0.7 objective of HQQ,
``sum |w - w'| ** 0.7 / sum |w| ** 0.7``; the relative error of ``x @ w.T``, x normal with one channel in fifty 20 times as
large; all three also as a share of ``max``'s; and milliseconds a million elements, on one thread. Times are of one run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.qparams import CLIPS

DEMO = Path.home() / ".cache" / "qcompile" / "demo"
SCHEMES = "group=64/shift/float16,group=32/affine/float16,group=32/symmetric/float16"
#: Rows of a weight that are measured.
ROWS = 384


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    sources = {"normal": [_normal(0)], "1 % outliers x 20": [_outliers(1)], "Student's t, 3": [_student(2)]}
    files = args.file or sorted(DEMO.glob("*/**/model.safetensors"))
    for file in files:
        name = file.relative_to(DEMO).parts[0] if file.is_relative_to(DEMO) else file.stem
        sources[name] = list(_stored(file, args.tensors))
    head = ["weights", "scheme", "optimizer", "weight l2", "of max", "l_0.7", "of max", "output", "of max", "ms / M"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}", flush=True)
    for ending in args.schemes.split(","):
        for bits in args.bits.split(","):
            scheme = Scheme.parse(f"qint{bits}/{ending}")
            for name, weights in sources.items():
                _rows(name, weights, scheme)


def _rows(name: str, weights: list[Tensor], scheme: Scheme) -> None:
    base: list[float] = []
    for clip in CLIPS:
        figures, seconds, elements = [], 0.0, 0
        for weight in weights:
            start = time.perf_counter()
            quantized = QTensor.quantize(weight, scheme, clip)
            seconds += time.perf_counter() - start
            elements += weight.numel()
            figures.append(_errors(weight, quantized))
        means = [statistics.fmean(column) for column in zip(*figures, strict=True)]
        base = base or means
        cells = [text for mean, least in zip(means, base, strict=True) for text in (f"{mean:.4f}", f"{mean / least:.3f}")]
        print(f"| {name} | {scheme} | {clip} | {' | '.join(cells)} | {1e9 * seconds / elements:.0f} |", flush=True)


def _errors(weight: Tensor, quantized: QTensor) -> tuple[float, float, float]:
    wide = weight.double()
    error = quantized.dequantize().double() - wide
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, weight.shape[1], generator=generator).double()
    x *= torch.where(torch.rand(weight.shape[1], generator=generator) < 0.02, 20.0, 1.0)
    return (
        float(error.norm() / wide.norm()),
        float(error.abs().pow(0.7).sum() / wide.abs().pow(0.7).sum()),
        float((x @ error.T).norm() / (x @ wide.T).norm()),
    )


def _normal(seed: int) -> Tensor:
    return 0.02 * torch.randn(ROWS, 512, generator=torch.Generator().manual_seed(seed))


def _outliers(seed: int) -> Tensor:
    chosen = torch.rand(ROWS, 512, generator=torch.Generator().manual_seed(seed + 100)) < 0.01
    return torch.where(chosen, 20.0, 1.0) * _normal(seed)


def _student(seed: int) -> Tensor:
    squares = torch.randn(3, ROWS, 512, generator=torch.Generator().manual_seed(seed + 100)).square().mean(0)
    return _normal(seed) / squares.sqrt()


def _stored(file: Path, count: int) -> Iterator[Tensor]:
    """Matrices spread evenly over a file, tables of many rows left out."""
    with safe_open(file, framework="pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        names = [n for n, shape in shapes.items() if len(shape) == 2 and min(shape) >= 128 and shape[0] < 20000]
        names = [n for n in names if "embed" not in n]
        if not names:
            raise SystemExit(f"{str(file)!r} holds no matrix of at least 128 x 128")
        for i in range(min(count, len(names))):
            yield tensors.get_slice(names[i * len(names) // count])[:ROWS].float()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--file", type=Path, action="append", help="weights, a safetensors file (may be repeated)")
    parser.add_argument("--tensors", type=int, default=3, help="matrices of each file (default: 3)")
    parser.add_argument("--schemes", default=SCHEMES, help="what follows the dtype, with commas between several")
    parser.add_argument("--bits", default="4,3,2", help="default: 4,3,2")
    return parser.parse_args()


if __name__ == "__main__":
    main()
