"""What a GPU is: the name of its architecture and the sizes that choosing a configuration needs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """A GPU, or one to compile for.

    Attributes:
        arch: ``sm_80``, ``sm_90``, ``gfx942``, …
        processors: streaming multiprocessors, or compute units.
    """

    arch: str
    processors: int

    @property
    def hip(self) -> bool:
        """Whether it is AMD's."""
        return self.arch.startswith("gfx")

    @property
    def capability(self) -> int:
        """80 for ``sm_80``; 0 for an AMD device."""
        return 0 if self.hip else int(self.arch.removeprefix("sm_"))

    @property
    def family(self) -> str:
        """The row of the table of configurations."""
        if self.hip:
            return "cdna"
        # the desktop's sm_120 multiplies with the instructions of sm_89
        return {80: "ampere", 90: "hopper", 100: "blackwell", 103: "blackwell"}.get(self.capability, "ada")

    @property
    def float8(self) -> tuple[str, ...]:
        """Float8 dtypes that its tensor cores multiply."""
        if self.hip:
            return ("e4m3fnuz",) if self.arch.startswith("gfx94") else ("e4m3fn",) if self.arch >= "gfx950" else ()
        return ("e4m3fn", "e5m2") if self.capability >= 89 else ()

    def refusal(self) -> str | None:
        """Why Triton's kernels do not run there; None where they do."""
        if self.hip:
            return None if self.arch.startswith("gfx9") else f"the Triton kernels take AMD's gfx9 parts, not {self.arch}"
        return None if self.capability >= 80 else f"Triton needs sm_80 or newer, this is {self.arch}"


#: What is assumed where the machine has no GPU, as when a program for another machine is looked at.
ASSUMED = Target("sm_80", 108)

_override: list[Target] = []


@contextlib.contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Take ``target`` for every device: tests, and reports about devices that are not there."""
    _override.append(target)
    try:
        yield
    finally:
        _override.pop()


def target_of(device: torch.device) -> Target:
    """The GPU behind a torch device."""
    if _override:
        return _override[-1]
    if not torch.cuda.is_available():
        return ASSUMED
    return _real(torch.cuda.current_device() if device.index is None else device.index)


def present() -> bool:
    """Whether there is a GPU that Triton could drive, and nothing else was asked for."""
    return not _override and torch.cuda.is_available()


@functools.cache
def _real(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target(properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)
