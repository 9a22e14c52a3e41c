"""What calibration keeps of the activations that it sees, and the scale that comes of it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qcompile.kernels.dtypes import QType

Method: TypeAlias = Literal["ema", "minmax", "percentile", "mse", "histogram"]
METHODS: tuple[Method, ...] = ("ema", "minmax", "percentile", "mse", "histogram")

_BINS = 2048

__all__ = ["METHODS", "Method", "Observer"]


class Observer:
    """The largest magnitude of an activation, batch by batch, and where the method needs one a histogram of magnitudes.

    ==============  ==========================================================================================
    method          the range that the scale covers
    ==============  ==========================================================================================
    ``ema``         the batches' largest magnitudes, averaged: ``momentum * before + (1 - momentum) * batch``
    ``minmax``      the largest magnitude of all batches
    ``percentile``  that share of all magnitudes
    ``mse``         where rounding and clipping together have the least squared error
    ``histogram``   where the clipped and rounded distribution diverges least from the true one (Kullback-Leibler,
                    Migacz 2017, "8-bit inference with TensorRT")
    ==============  ==========================================================================================

    Args:
        method: one of the above.
        momentum: of ``ema``, from 0 (the last batch alone) to below 1.
        percentile: of ``percentile``, in percent.
    """

    def __init__(self, method: Method = "ema", momentum: float = 0.9, percentile: float = 99.99) -> None:
        self.method, self.momentum, self.percentile = method, momentum, percentile
        self.batches = 0
        self.largest = 0.0
        self._counts: Tensor | None = None
        self._top = 0.0

    def see(self, x: Tensor) -> None:
        """Take a batch into account; an empty one, and NaN or infinity in it, are left out."""
        if x.numel() == 0:
            return
        magnitudes = x.detach().abs().float()
        largest = float(magnitudes.amax())
        if not torch.isfinite(torch.tensor(largest)):
            magnitudes = magnitudes[torch.isfinite(magnitudes)]
            if magnitudes.numel() == 0:
                return
            largest = float(magnitudes.amax())
        self.batches += 1
        if self.method == "ema":
            first = self.batches == 1
            self.largest = largest if first else self.momentum * self.largest + (1 - self.momentum) * largest
            return
        self.largest = max(self.largest, largest)
        if self.method != "minmax":
            self._count(magnitudes, largest)

    def scale(self, qtype: QType) -> float | None:
        """The scale for a dtype: float32; None where nothing was seen, 1 where all was zero."""
        if self.batches == 0:
            return None
        edge = self._edge(qtype)
        # Never below float32's smallest normal number, of which the codes' reciprocal is still finite.
        return max(edge / qtype.qmax, torch.finfo(torch.float32).tiny * 16) if edge > 0 else 1.0

    def _count(self, magnitudes: Tensor, largest: float) -> None:
        """Add to the histogram, whose range doubles, two bins becoming one, until the batch fits."""
        if self._counts is None:
            self._counts, self._top = torch.zeros(_BINS, dtype=torch.float64), max(largest, 1e-30)
        while largest > self._top:
            folded = self._counts.view(-1, 2).sum(dim=1)
            self._counts = torch.cat([folded, torch.zeros_like(folded)])
            self._top *= 2
        self._counts += torch.histc(magnitudes.cpu(), _BINS, 0.0, self._top).double()

    def _edge(self, qtype: QType) -> float:
        if self._counts is None or self._counts.sum() == 0 or self.largest == 0:
            return self.largest
        width = self._top / _BINS
        if self.method == "percentile":
            share = self._counts.cumsum(0) / self._counts.sum()
            index = int(torch.searchsorted(share, self.percentile / 100))
            return min(self.largest, (index + 1) * width)
        centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width
        best, edge = float("inf"), self.largest
        for step in range(100):
            candidate = self.largest * (1 - step / 100)
            loss = self._loss(centers, candidate, qtype)
            if loss < best:
                best, edge = loss, candidate
        return edge

    def _loss(self, centers: Tensor, edge: float, qtype: QType) -> float:
        """What is lost when the range ends at ``edge``."""
        if self._counts is None:
            return 0.0
        scale = edge / qtype.qmax
        codes = (centers / scale).clamp(max=qtype.qmax)
        codes = codes.float().to(qtype.dtype).double() if qtype.is_float else codes.round()
        rounded = codes * scale
        if self.method == "mse":
            return float((self._counts * (rounded - centers) ** 2).sum())
        return _divergence(self._counts, codes)


def _divergence(counts: Tensor, codes: Tensor) -> float:
    """``KL(p || q)``: p the histogram, what is clipped added to the last bin; q each code's mass spread over its bins."""
    last = int((codes < codes.max()).sum())
    p = counts.clone()
    p[last] += p[last + 1 :].sum()
    p[last + 1 :] = 0
    _, group = torch.unique(codes, return_inverse=True)
    groups = int(group.max()) + 1
    occupied = (counts > 0).double()
    occupied[last + 1 :] = 0
    mass = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, counts * occupied)
    bins = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, occupied)
    q = (mass / bins.clamp(min=1))[group] * occupied
    p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
    seen = (p > 0) & (q > 0)
    missing = p[(p > 0) & (q == 0)].sum()
    return float((p[seen] * (p[seen] / q[seen]).log()).sum() + missing * 100)
