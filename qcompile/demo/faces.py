"""Photos, and a detector that finds the faces on them: MTCNN of facenet-pytorch (MIT), with its weights.

The detector's package imports torchvision for two functions, a non-maximum suppression and one that is never reached from
``detect``. Both are stood in for while it is imported, so that it works beside any build of torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.demo.fetch import fetch
from qcompile.demo.folders import unpacked
from qcompile.demo.packages import FACENET, PHOTOS

__all__ = ["batched_nms", "load_mtcnn", "photo"]

_PACKAGE = "facenet_pytorch"


def photo(name: str) -> np.ndarray:
    """A photo that scikit-image carries, such as ``"astronaut"`` (NASA, public domain): uint8 ``[h, w, 3]``.

    Raises:
        ValueError: there is no such photo.
    """
    from PIL import Image

    kept = {f"skimage/data/{n}.png" for n in ("astronaut", "chelsea", "coffee")}
    folder = unpacked("photos", PHOTOS.filename, lambda: fetch(PHOTOS), lambda n: n in kept, PHOTOS.unpacked_limit)
    path = f"skimage/data/{name}.png"
    if path not in kept:
        raise ValueError(f"there is no photo {name!r}; there are astronaut, chelsea and coffee")
    with Image.open(folder / path) as image:
        return np.asarray(image.convert("RGB"))


def load_mtcnn(**options: Any) -> Any:
    """facenet-pytorch's ``MTCNN`` with its pretrained weights, in eval mode; ``options`` are those of its constructor."""
    folder = unpacked(
        "facenet-pytorch", FACENET.filename, lambda: fetch(FACENET), lambda n: n.startswith(f"{_PACKAGE}/"),
        FACENET.unpacked_limit,
    )  # fmt: skip
    with _importable(folder):
        module = importlib.import_module(f"{_PACKAGE}.models.mtcnn")
    return module.MTCNN(**options).eval()


@torch.library.custom_op("qcompile_demo::batched_nms", mutates_args=())
def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each group, as torchvision's operator: what it keeps depends on the values.

    Args:
        boxes: float ``[n, 4]``, corners x1, y1, x2, y2.
        scores: float ``[n]``.
        groups: int64 ``[n]``; boxes of different groups do not suppress each other.
        threshold: of intersection over union above which the lower score goes.

    Returns:
        Indices of what is kept, int64, by falling score.
    """
    order = scores.argsort(descending=True, stable=True)
    corners, group = boxes[order].double().numpy(), groups[order].numpy()
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    alive = np.ones(len(corners), dtype=bool)
    for i in range(len(corners)):
        if alive[i]:
            low = np.maximum(corners[i, :2], corners[i + 1 :, :2])
            high = np.minimum(corners[i, 2:], corners[i + 1 :, 2:])
            shared = np.clip(high - low, 0, None).prod(1)
            over = shared > threshold * (area[i] + area[i + 1 :] - shared)
            alive[i + 1 :] &= ~(over & (group[i + 1 :] == group[i]))
    return order[torch.from_numpy(alive)]


@batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    return groups.new_empty([torch.library.get_ctx().new_dynamic_size()])


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The detector's modules can be imported: torchvision stood in for, its package's own ``__init__`` not run.

    That ``__init__`` would import a face recogniser too, and what that needs to download its weights.
    """
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(folder / _PACKAGE)]
    stands_in: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.transforms": {"functional": types.SimpleNamespace()},
        "torchvision.ops": {},
        "torchvision.ops.boxes": {"batched_nms": batched_nms},
    }
    before = {name: sys.modules.get(name) for name in stands_in}
    for name, members in stands_in.items():
        module = types.ModuleType(name)
        for member, value in members.items():
            setattr(module, member, value)
        sys.modules[name] = module
    sys.modules.setdefault(_PACKAGE, package)
    try:
        yield
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before
