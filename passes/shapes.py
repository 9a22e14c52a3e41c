"""Comparing sizes that may be symbolic, without adding a guard to the compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input that the program will see."""
    return bool(statically_known_true(a == b))


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every input that the program will see."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))
