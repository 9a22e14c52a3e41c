"""No garbage collection while a graph is compiled.

Tracing and rewriting make some hundred thousand objects, which live until the work is done: each collection in between walks
over all of them, and frees next to nothing.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qcompile.kernels.memory import give_back

__all__ = ["collection_paused"]

_lock = threading.Lock()
_holders = 0
_paused = False


@contextmanager
def collection_paused() -> Iterator[None]:
    """Inside the block the process collects no cycles; what nothing refers to is freed at once, as ever.

    Blocks may be nested, and several threads may be in one: the last that leaves turns collection on again, unless it was
    off before the first came, collects what was made meanwhile, and gives what that freed back to the system.
    """
    global _holders, _paused
    with _lock:
        _holders += 1
        if _holders == 1:
            _paused = gc.isenabled()
            gc.disable()
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            last = _holders == 0
            collecting = last and _paused
            if collecting:
                gc.enable()
        if collecting:
            gc.collect(0)  # all that was made since is in the youngest generation
        if last:
            give_back()
