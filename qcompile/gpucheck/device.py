"""The GPU of this machine: what it is, and what it reaches at best in memory traffic and in float16 products."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: Torch device types that kernels are registered for, and what they are called here.
KINDS = {"cuda": "NVIDIA or AMD GPU", "mps": "Apple GPU"}


@dataclass(frozen=True)
class Gpu:
    """device: ``cuda`` (AMD's too) or ``mps``. name: as the driver says. cache: bytes of the last level cache."""

    device: str
    name: str
    cache: int

    @property
    def nvidia(self) -> bool:
        return self.device == "cuda" and torch.version.hip is None


def find() -> Gpu | None:
    """This machine's GPU, or None."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        arch = getattr(properties, "gcnArchName", None) if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        return Gpu("cuda", f"{properties.name} ({arch})", int(getattr(properties, "L2_cache_size", 0) or 64 << 20))
    if torch.backends.mps.is_available():
        return Gpu("mps", platform.processor() or platform.machine(), 32 << 20)
    return None


def missing(device: str) -> str:
    """Why nothing can run on a device of that type here."""
    return f"no {KINDS.get(device, device)} here"


def synchronize(device: str) -> None:
    """Wait for all that was launched."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def seconds(calls: Sequence[Callable[[], object]], device: str, least: float = 0.02) -> float:
    """Seconds of one call: the median of five rounds through all ``calls``, each round of ``least`` seconds or more.

    Give as many calls on memory of their own as do not fit the cache together. On CUDA they run as a graph where they can be
    captured, so that launching them costs what it does in a compiled decoder.
    """
    for call in calls:
        call()
    synchronize(device)
    run = _captured(calls) if device == "cuda" else None

    def one_round() -> None:
        if run is not None:
            run()
        else:
            for call in calls:
                call()

    def timed(repeats: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            one_round()
        synchronize(device)
        return time.perf_counter() - start

    timed(1)
    repeats = max(1, round(least / max(timed(2) / 2, 1e-7)))
    return statistics.median(timed(repeats) for _ in range(5)) / repeats / len(calls)


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None] | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except Exception:  # some libraries synchronize, or allocate outside of torch; these are timed with their launches
        torch.cuda.synchronize()
        return None
    return graph.replay


def bandwidth(device: str, size: int = 1 << 29) -> float:
    """Bytes a second, read and written, of the largest copy."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds([lambda: target.copy_(source)], device)


def peak(device: str, size: int = 8192) -> float:
    """Float16 operations a second of a large square product."""
    a = torch.randn(size, size, dtype=torch.float16, device=device)
    return 2 * size**3 / seconds([lambda: a @ a], device)
