"""What a pass is."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

from qcompile.passes.program import Program


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a whole program: a frozen dataclass whose fields are its options.

    The docstring of each pass draws what it rewrites, and says what must hold before and what holds after.
    """

    @classmethod
    def text_name(cls) -> str:
        """The name on the command line and in dumps: ``FuseSiblings`` is ``fuse-siblings``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def __str__(self) -> str:
        options = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)
        return self.text_name() + (f"{{{options}}}" if options else "")

    @abstractmethod
    def run(self, program: Program) -> int:
        """Rewrite ``program`` in place; returns how many times something matched."""
