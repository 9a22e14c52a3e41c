"""Depthwise weights: one kernel a channel, 16 channels side by side.

Codes take a byte each, whatever their range: uint8 ``[tiles, positions, 16]``. Scale and zero point lie beside them as
``[tiles, groups, 16]``, where a group is a run of positions that share a scale. Padding channels get code and scale 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.layouts.tiled import TILE


def tile(rows: Tensor) -> Tensor:
    """``[channels, n]`` -> ``[tiles, n, 16]``."""
    tiles = -(-rows.shape[0] // TILE)
    whole = rows.new_zeros(tiles * TILE, rows.shape[1])
    whole[: rows.shape[0]] = rows
    return whole.view(tiles, TILE, rows.shape[1]).transpose(1, 2).contiguous()


def untile(tiles: Tensor, channels: int) -> Tensor:
    """The inverse of :func:`tile`."""
    return torch.flatten(tiles.transpose(1, 2), 0, 1)[:channels]
