"""Progress of work that takes longer than a second or two: a tqdm bar, or a plain line where tqdm is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

__all__ = ["Bar", "progress_bar", "stage", "track"]

T = TypeVar("T")

#: Wraps a finite iterable of work titled by a text; iterating over the result does the work and shows how far it is.
Bar = Callable[[Iterable[Any], str], Iterable[Any]]

#: Seconds of work before anything is shown: what is done sooner needs no bar.
DELAY = 1.0


def progress_bar(stream: TextIO | None = None) -> Bar | None:
    """How to show progress, or None where nobody watches.

    None unless ``stream`` (standard error by default) is a terminal, or where ``QCOMPILE_PROGRESS=0`` is set.
    """
    stream = sys.stderr if stream is None else stream
    setting = os.environ.get("QCOMPILE_PROGRESS")
    if setting == "0" or not (setting == "1" or stream.isatty()):
        return None
    if importlib.util.find_spec("tqdm") is not None and stream.isatty():
        return lambda items, what: _with_tqdm(items, what, stream)
    return lambda items, what: _with_lines(list(items), what, stream)


def track(items: Iterable[T], what: str) -> Iterable[T]:
    """``items``, with a progress bar where somebody watches."""
    bar = progress_bar()
    return items if bar is None else bar(items, what)


def _with_tqdm(items: Iterable[T], what: str, stream: TextIO) -> Iterable[T]:
    from tqdm import tqdm

    return tqdm(list(items), desc=what, delay=DELAY, leave=False, file=stream, dynamic_ncols=True)


def _with_lines(items: Sequence[T], what: str, stream: TextIO) -> Iterator[T]:
    """A line after the first second, then one about every tenth of the work, at most one a second, and one at the end."""
    start = last = time.monotonic()
    shown = 0
    for i, item in enumerate(items):
        now = time.monotonic()
        if now - last >= DELAY and (shown == 0 or i - shown >= len(items) / 10):
            print(f"{what}: {i} of {len(items)}, {now - start:.0f} s", file=stream, flush=True)
            last, shown = now, i
        yield item
    if shown:
        print(f"{what}: {len(items)} of {len(items)}, {time.monotonic() - start:.0f} s", file=stream, flush=True)


@contextmanager
def stage(what: str, stream: TextIO | None = None) -> Iterator[None]:
    """Say what takes a while and cannot be counted, where somebody watches; the line goes when it is over."""
    stream = sys.stderr if stream is None else stream
    watched = progress_bar(stream) is not None
    if not watched:
        yield
        return
    end = "\r" if stream.isatty() else "\n"
    print(f"{what} …", end=end, file=stream, flush=True)
    try:
        yield
    finally:
        if end == "\r":
            print(" " * (len(what) + 2), end="\r", file=stream, flush=True)
