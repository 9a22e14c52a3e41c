"""Face detection with MTCNN, which no tracer can take: the same faces found, with everything in 8 bits.

    python docs/examples/face_detection.py [--quick]

MTCNN is three small networks with Python in between: how often each runs, and on how much, depends on what the one before
it found. ``torch.export`` therefore fails on it, and the example shows how. Quantizing the modules in place needs no graph:

    qcompile.quantize(detector, weights=qcompile.qint8, activations=qcompile.qint8)
    with qcompile.Calibration():
        detector.detect(photo)
    qcompile.freeze(detector)

Every convolution and linear layer of the three networks then reads 8-bit weights and 8-bit activations. The pictures are
made of scikit-image's portrait of an astronaut, turned round, in several sizes and lights, pasted beside each other, and of
photos without a face; calibration sees others than the test.

Seen on an AMD EPYC (Zen 5, AVX-512 and VNNI; one thread of two busy cores): six pictures. ``torch.export``
fails with "Could not guard on data-dependent expression". Float finds 9 faces; all in qint8 finds the same 9 and no other,
overlap of the boxes 0.937 (intersection over union), least sure of 0.999 for both; 1.98 MB become 0.55.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import need, stage, weight_bytes, working_copy
from torch import nn

import qcompile
from qcompile.demo.table import table

Boxes = np.ndarray  # float [n, 4], corners x1, y1, x2, y2


def scaled(picture: np.ndarray, size: float, light: float = 1.0, mirrored: bool = False) -> np.ndarray:
    """A picture, uint8 ``[h, w, 3]``, made smaller or larger, darker or lighter, and perhaps turned round."""
    pixels = torch.from_numpy(picture[:, ::-1].copy() if mirrored else picture.copy()).permute(2, 0, 1)[None].float()
    pixels = nn.functional.interpolate(pixels, scale_factor=size, mode="bilinear", antialias=True) * light
    return pixels.clamp(0, 255).round().byte()[0].permute(1, 2, 0).numpy()


def beside(*pictures: np.ndarray) -> np.ndarray:
    """Pictures in a row on black."""
    out = np.zeros((max(p.shape[0] for p in pictures), sum(p.shape[1] for p in pictures), 3), dtype=np.uint8)
    left = 0
    for picture in pictures:
        out[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1]
    return out


def find(detector: nn.Module, picture: np.ndarray) -> tuple[Boxes, np.ndarray]:
    """The boxes of the faces in a picture, ``[n, 4]``, and how sure the detector is of each, ``[n]``."""
    boxes, sure = detector.detect(picture)
    if boxes is None:
        return np.zeros((0, 4)), np.zeros(0)
    return np.asarray(boxes, dtype=np.float64), np.asarray(sure, dtype=np.float64)


def overlaps(left: Boxes, right: Boxes) -> np.ndarray:
    """Intersection over union of each box with each other: ``[n, m]``."""
    low = np.maximum(left[:, None, :2], right[None, :, :2])
    high = np.minimum(left[:, None, 2:], right[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (left, right)]
    return shared / (area[0][:, None] + area[1][None] - shared)


def compare(float_boxes: Sequence[Boxes], boxes: Sequence[Boxes], least: float = 0.5) -> tuple[int, int, int, float]:
    """Faces of the float model, how many of them were found again, how many others, and the mean overlap of those found."""
    total = sum(map(len, float_boxes))
    again: list[float] = []
    for before, after in zip(float_boxes, boxes, strict=True):
        best = overlaps(before, after).max(1, initial=0.0)
        again += [value for value in best.tolist() if value >= least]
    others = sum(map(len, boxes)) - len(again)
    return total, len(again), others, float(np.mean(again)) if again else float("nan")


def quantize(detector: nn.Module, pictures: Sequence[np.ndarray]) -> nn.Module:
    """A copy of the detector with everything in 8 bits, calibrated on the pictures and frozen."""
    new = qcompile.quantize(working_copy(detector), weights=qcompile.qint8, activations=qcompile.qint8)
    with qcompile.Calibration():
        for picture in pictures:
            find(new, picture)
    return qcompile.freeze(new)


def left_in_float(detector: nn.Module) -> list[str]:
    """The convolutions and linear layers that were not quantized: there should be none."""
    kinds = (nn.Conv2d, nn.Linear)
    return [n for n, m in detector.named_modules() if isinstance(m, kinds) and not isinstance(m, qcompile.QModuleMixin)]


def why_not_exported(detector: nn.Module, picture: np.ndarray) -> str:
    """The first line of what torch.export says, or an empty string where it works."""
    try:
        torch.export.export(detector, (torch.from_numpy(picture.copy()),), strict=True)
    except Exception as error:  # what is raised differs between versions of torch
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def pictures(portrait: np.ndarray, faceless: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Pictures to calibrate on, and others to test on."""
    calibration = [scaled(portrait, 0.8, 0.9), scaled(portrait, 1.1, 1.1, mirrored=True), faceless[0]]
    sizes = [scaled(portrait, size, light, turned) for size, light, turned in
             ((0.5, 1.0, False), (0.7, 0.6, True), (0.9, 1.3, False), (0.6, 0.8, True))]  # fmt: skip
    test = [portrait, scaled(portrait, 1.0, mirrored=True), beside(*sizes[:2]), beside(*sizes), scaled(portrait, 1.3, 0.5)]
    return calibration, test + list(faceless[1:])


def main() -> None:
    """Fetch the detector and the photos, show that it cannot be exported, quantize it, and print the table."""
    parser = argparse.ArgumentParser(description="MTCNN: the same faces with 8-bit weights and activations")
    parser.add_argument("--quick", action="store_true", help="three pictures only")
    options = parser.parse_args()
    need("PIL")
    from qcompile.demo.faces import load_mtcnn, photo

    detector: Any = load_mtcnn(keep_all=True)
    calibration, test = pictures(photo("astronaut"), [photo("chelsea"), photo("coffee")])
    test = test[:3] if options.quick else test
    print(f"torch.export: {why_not_exported(detector, test[0]) or 'works on this version'}")
    with stage("quantize and calibrate"):
        eight = quantize(detector, calibration)
    print(f"convolutions and linear layers left in float: {len(left_in_float(eight))}")
    with stage("float32"):
        expected = [find(detector, picture) for picture in test]
    with stage("qint8"):
        found = [find(eight, picture) for picture in test]
    total, again, others, overlap = compare([boxes for boxes, _ in expected], [boxes for boxes, _ in found])
    rows = [
        [name, str(faces), str(extra), shared, f"{min((s.min() for _, s in each if len(s)), default=float('nan')):.3f}",
         f"{weight_bytes(model) / 1e6:.2f}"]
        for name, model, faces, extra, shared, each in (
            ("float32", detector, total, 0, "1.000", expected), ("all qint8", eight, again, others, f"{overlap:.3f}", found),
        )
    ]  # fmt: skip
    print(f"{len(test)} pictures")
    print(table(["MTCNN", "faces found", "others", "overlap of boxes", "least sure", "MB"], rows))


if __name__ == "__main__":
    main()
