"""What Inductor asks before its first program, of the processor and of Triton, asked while Dynamo traces."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import subprocess
import sys
import threading

__all__ = ["ask_ahead"]

#: What a process of its own writes: where it found Triton, and the key that Inductor asks Triton for.
_TRITON_KEY = """\
import triton
try:
    from triton.runtime.cache import triton_key
except ImportError:
    from triton.compiler.compiler import triton_key
print(triton.__file__, triton_key(), sep="\\n", end="")
"""


@functools.cache
def ask_ahead() -> threading.Thread:
    """Start asking, once in a process.

    Inductor loads a small library for each instruction set in a process of its own, and waits a second or two for them, and
    reads all of Triton, half a gigabyte, for the keys of its caches. It keeps what it finds. Tracing leaves a processor idle
    for that long; the passes do not: they would take the longer.

    Only what other processes do is asked here. A thread that reads files takes Python's lock from tracing several times a
    file: hashing torch's sources, an eighth of a second alone, held it up for nearly half a second.
    """
    # Inductor's settings are a thread's own: this one has those of the thread that starts it.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(_ask,), name="qcompile-ask-ahead", daemon=True)
    thread.start()
    return thread


def _ask() -> None:
    # Whatever is wrong Inductor meets again, and says.
    asked = None
    with contextlib.suppress(Exception):
        asked = _triton_asked()
    with contextlib.suppress(Exception):
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list

        valid_vec_isa_list()
    if asked is not None:
        with contextlib.suppress(Exception):
            _keep(asked)


def _triton_asked() -> subprocess.Popen[str]:
    """A process that works out Triton's key."""
    from torch._inductor.utils import python_subprocess_env

    # It imports what this one would: from sys.path, and nothing that happens to lie in the working directory.
    env = {**python_subprocess_env(), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _TRITON_KEY],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
    )  # fmt: skip


def _keep(asked: subprocess.Popen[str]) -> None:
    """Tell Inductor what the process found, unless that was another Triton than the one that this process has."""
    with asked:
        found, _ = asked.communicate()
    where, _, key = found.partition("\n")
    from torch._inductor.codecache import triton_key
    from torch._inductor.runtime import triton_compat

    if asked.returncode == 0 and triton_compat.HAS_TRITON and where == triton_compat.triton.__file__ and key:
        triton_key.set(key)  # type: ignore[attr-defined]
