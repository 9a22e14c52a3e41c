"""Progress bars: tqdm's on a terminal where it is installed, plain lines otherwise; on the standard error stream."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

__all__ = ["Progress", "bar", "say"]


class Progress(Protocol):
    """The part of tqdm that the demo uses."""

    @property
    def n(self) -> float: ...
    def update(self, n: float = 1) -> object: ...
    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None: ...


class _Lines:
    """What stands in for a bar in a log file, and without tqdm: a line when it starts, and one for each stage."""

    def __init__(self, what: str) -> None:
        self.n = 0.0
        self._start = time.perf_counter()
        say(f"  {what} …")

    def update(self, n: float = 1) -> None:
        self.n += n

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        if s:
            say(f"    {time.perf_counter() - self._start:5.0f} s  {s}")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


@contextmanager
def bar(total: int, what: str, unit: str = "it") -> Iterator[Progress]:
    """A bar of ``total`` steps titled ``what``; ``unit="B"`` counts bytes with their prefixes."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        with _Lines(what) as lines:
            yield lines
        return
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=f"  {what}",
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=True,
        file=sys.stderr,
        leave=True,
    ) as progress:
        yield progress


def say(text: str) -> None:
    """One line on the standard error stream, at once."""
    print(text, file=sys.stderr, flush=True)
