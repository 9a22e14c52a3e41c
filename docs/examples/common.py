"""What the examples share: a check for the packages that they need, and a copy of a model to quantize."""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["need", "stage", "weight_bytes", "working_copy"]

M = TypeVar("M", bound=torch.nn.Module)


def need(*packages: str) -> None:
    """Leave with a word on what to install, where one of the packages is missing."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        sys.exit(f"this example needs {', '.join(absent)}: pip install 'qcompile[examples]'")


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Say on the error stream what goes on, and how long it took."""
    start = time.perf_counter()
    print(f"  {what} …", file=sys.stderr, flush=True)
    yield
    print(f"  {what}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def working_copy(model: M) -> M:
    """A copy to quantize: :func:`qcompile.quantize` works in place, and the examples compare with the float model."""
    return copy.deepcopy(model).eval()


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers that the model holds; what is held under several names counts once."""
    return sum(tensor.nbytes for group in (model.parameters(), model.buffers()) for tensor in group)
