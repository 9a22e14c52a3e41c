"""What Inductor asks before its first program, of the processor and of torch's sources, asked while Dynamo traces."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading

__all__ = ["ask_ahead"]


@functools.cache
def ask_ahead() -> threading.Thread:
    """Start asking, once in a process.

    Inductor loads a small library for each instruction set in a process of its own, and waits a second or two for them, and
    reads all of torch's sources for the keys of its caches. It keeps what it finds. Tracing leaves a processor idle for that
    long; the passes do not: they would take the longer.
    """
    # Inductor's settings are a thread's own: this one has those of the thread that starts it.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(_ask,), name="qcompile-ask-ahead", daemon=True)
    thread.start()
    return thread


def _ask() -> None:
    # Whatever is wrong Inductor meets again, and says.
    with contextlib.suppress(Exception):
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list

        valid_vec_isa_list()
    with contextlib.suppress(Exception):
        from torch._inductor.codecache import torch_key

        torch_key()
