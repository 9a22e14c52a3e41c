"""The order of a convolution's columns in the tiled layout.

The logical matrix has a column for each input channel and kernel position, channels first. What the kernel gathers for an
output position is cheapest in another order, and the packed matrix has its columns in that one:

    ``rows``      channel, position             as the logical matrix
    ``patch``     position, channel             values that lie together in a channels-last image
    ``channels``  position, channel             blocks of 32 channels, which a pixel is quantized in once for all positions
                                                that read it; channels are padded to whole blocks

With ``channels`` and groups of scales, each of which covers all positions of some channels, the group comes first: group,
position, channel. Scales that follow channels and positions otherwise keep the columns in ``rows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qcompile.kernels.layouts.tiled import BLOCK

Order = Literal["rows", "patch", "channels"]
ORDERS: tuple[Order, ...] = ("rows", "patch", "channels")


def choose_order(weight_shape: Sequence[int], group_size: int) -> Order:
    """The order for a weight ``[out, in / groups, *kernel]`` whose scales cover ``group_size`` columns (0: all).

    Few channels are not padded to a block for each position where that would add more than a half.
    """
    channels, positions = weight_shape[1], taps(weight_shape)
    whole = group_size == 0 or group_size >= channels * positions
    if positions == 1 or not (whole or group_size % (BLOCK * positions) == 0):
        return "rows"
    if whole and 2 * padded(channels) > 3 * channels:
        return "patch"
    return "channels"


def taps(weight_shape: Sequence[int]) -> int:
    """Positions of the kernel."""
    count = 1
    for size in weight_shape[2:]:
        count *= size
    return count


def padded(channels: int) -> int:
    """``channels`` rounded up to whole blocks."""
    return -(-channels // BLOCK) * BLOCK


def packed_columns(weight_shape: Sequence[int], order: str) -> int:
    """Columns of the packed matrix."""
    return (padded(weight_shape[1]) if order == "channels" else weight_shape[1]) * taps(weight_shape)


def columns(weight_shape: Sequence[int], order: str, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The packed column of each logical one: int64 ``[in / groups * positions]``."""
    channels, positions = weight_shape[1], taps(weight_shape)
    c = torch.arange(channels, device=device)[:, None]
    p = torch.arange(positions, device=device)[None, :]
    if order == "rows":
        return (c * positions + p).reshape(-1)
    if order == "patch":
        return (p * channels + c).reshape(-1)
    width = padded(channels)
    size = group_size // positions if 0 < group_size < channels * positions else width
    first = c // size * size  # of the channel's group
    return (first * positions + p * (width - first).clamp(max=size) + c - first).reshape(-1)
