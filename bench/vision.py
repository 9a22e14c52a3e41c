"""A convolutional network, EfficientNet-lite0: milliseconds a batch against ONNX Runtime and ``torch.compile``, in turns.

    python bench/vision.py                         # batches of 1 and of 8 images
    python bench/vision.py --batches 16 --emulate-avx2

ONNX Runtime's int8 is static: weights a channel, activations a tensor, calibrated on 32 crops of photographs, in the form
that ONNX Runtime advises (QDQ). Ours are the same calibrated on the same crops and frozen (``activations``), and weights
alone, both under ``torch.compile(backend="qcompile")``; the former by ``qcompile.trace``, too (``traced``), and exported and
compiled ahead of time (``package``), which, as ONNX Runtime's session, has no Python to call. Results are compared with
float's, by cosine of the logits and by class, before anything is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from benchkit import command, machine, peers
from benchkit.records import Record, table
from benchkit.timing import WARM, medians
from benchkit.vision_models import efficientnet_lite0, photographs
from torch import Tensor

CALIBRATION = 32
PAUSE = 0.15  # ONNX Runtime's threads go on spinning for a while after a run


def main() -> None:
    args = _arguments()
    machine.emulate_avx2(args.emulate_avx2)
    threads = machine.use_threads(args.threads)
    print(machine.summary(), flush=True)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in args.batches.split(","):
            records += _batch(int(batch), Path(folder), threads, args.seconds)
    command.finish(args, "vision", records)


def _batch(size: int, folder: Path, threads: int, seconds: float) -> list[Record]:
    import qcompile

    torch.compiler.reset()
    samples = photographs(CALIBRATION + size)
    images, samples = samples[CALIBRATION:].clone(), samples[:CALIBRATION]
    plain = torch.compile(efficientnet_lite0(), dynamic=False)
    calls: dict[str, Callable[[], Tensor]] = {"float32 compiled": lambda: plain(images)}
    alone = torch.compile(efficientnet_lite0(), backend="qcompile", dynamic=False, options={"weights": "qint8"})
    calls["qcompile qint8"] = lambda: alone(images)
    calibrated = qcompile.quantize(efficientnet_lite0(), weights="qint8", activations="qint8")
    with torch.no_grad():
        qcompile.calibrate(calibrated, list(samples.split(8)))
    frozen = qcompile.freeze(calibrated)
    both, traced = torch.compile(frozen, backend="qcompile", dynamic=False), qcompile.trace(frozen)
    calls["qcompile qint8 activations"] = lambda: both(images)
    calls["qcompile qint8 activations, traced"] = lambda: traced(images)
    package = _package(images, samples, folder / f"{size}.pt2")
    calls["qcompile qint8 activations, package"] = lambda: package(images)
    if peers.available("onnxruntime", "onnx"):
        calls |= _onnxruntime(images, samples, folder / str(size), threads)
    with torch.no_grad():
        results = {kind: call().clone() for kind, call in calls.items()}
        times = medians(calls, seconds, pause=PAUSE, warm=WARM)
    wanted = results["float32 compiled"]
    rows = []
    for kind, t in times.items():
        cosine = float(torch.cosine_similarity(results[kind], wanted).mean())
        same = float((results[kind].argmax(1) == wanted.argmax(1)).float().mean())
        rows.append([kind, f"{t * 1e3:.2f}", f"{times['float32 compiled'] / t:.2f}x", f"{cosine:.4f}", f"{same:.0%}"])
    print(f"\n{size} images\n{table(['engine', 'ms', 'against float32', 'cosine', 'same class'], rows)}", flush=True)
    return [Record({"model": "EfficientNet-lite0", "batch": size}, kind, t * 1e3, "ms") for kind, t in times.items()]


def _package(images: Tensor, samples: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    import qcompile

    with torch.no_grad():
        program = torch.export.export(efficientnet_lite0(), (images,))
        quantized = qcompile.quantize(program, weights="qint8", activations="qint8")
        size = len(images)
        calibrated = qcompile.calibrate(quantized, list(samples[: len(samples) // size * size].split(size)))
        return qcompile.aot_load(qcompile.aot_compile(calibrated, file))


def _onnxruntime(images: Tensor, samples: Tensor, base: Path, threads: int) -> dict[str, Callable[[], Tensor]]:
    from benchkit import onnx_models

    base.mkdir()
    file = onnx_models.export(efficientnet_lite0(), (images,), base / "model.onnx", ("images",))
    size = len(images)
    crops = [part.numpy() for part in samples[: len(samples) // size * size].split(size)]
    files = {"float32": file, "int8": onnx_models.static_int8(file, "images", crops)}
    return {f"onnxruntime {kind}": onnx_models.session(path, {"images": images}, threads) for kind, path in files.items()}


def _arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--batches", default="1,8", help="images, comma separated")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each batch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
