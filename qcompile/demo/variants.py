"""The ways in which the demo runs one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["VARIANTS", "Variant", "by_name"]


@dataclass(frozen=True)
class Variant:
    """A name and how to compile: ``backend`` None is eager; ``options`` go to it as they are."""

    name: str
    backend: str | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized."""
        return self.backend == "qcompile"

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as this variant runs it. Shapes are static: each shape is one program."""
        if self.backend is None:
            return function
        if self.quantized:
            import qcompile

            return qcompile.trace(function, **self.options)
        import torch

        options = dict(self.options) if self.options else None
        return torch.compile(function, backend=self.backend, fullgraph=True, dynamic=False, options=options)


VARIANTS = (
    Variant("float32 eager", None),
    Variant("float32 compiled", "inductor"),
    Variant("qint8", "qcompile", {"weights": "qint8", "group_size": 32}),
    Variant("qint4", "qcompile", {"weights": "qint4", "group_size": 32}),
)


def by_name(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ValueError: there is none.
    """
    for variant in VARIANTS:
        if variant.name == name:
            return variant
    raise ValueError(f"no variant is named {name!r}; there are {', '.join(repr(v.name) for v in VARIANTS)}")
