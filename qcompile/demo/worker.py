"""One process for one variant of a model, so that its memory figures are its own.

The parent (``Worker``) sends one request as a line of JSON and reads one line back. The child (``serve``) answers them
with the methods of an object; what it or a library prints goes to the standard error stream, never into the answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from typing import Any

__all__ = ["Worker", "WorkerError", "serve"]


class WorkerError(RuntimeError):
    """A request failed in the worker; the message is the worker's traceback, or how it ended."""


class Worker:
    """The parent's end: ``worker.ask("method", key=value)`` returns what the child's method returned.

    Args:
        module: run with ``python -m`` in the child; it must call ``serve``.
        arguments: its command line.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.name = f"{module} {' '.join(arguments)}".strip()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call a method of the child and wait for its result.

        Raises:
            WorkerError: it raised, or the child is gone.
        """
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise WorkerError(f"{self.name}: no pipe to the worker")
        try:
            process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"{self.name} ended with status {process.wait()} before {method!r}") from None
        line = process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name} ended with status {process.wait()} during {method!r}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {method} failed\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the child: ask it to leave, and kill it when it does not."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it is gone already, with a request unread
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def serve(target: Any) -> None:
    """The child's end: answer each line of the standard input with the named public method of ``target``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whoever prints to the standard output from here on, C++ included, reaches the error stream
    for line in sys.stdin:
        request = json.loads(line)
        try:
            name = request["method"]
            if name.startswith("_"):
                raise ValueError(f"{name!r} is not a public method")
            reply = {"result": getattr(target, name)(**request["arguments"])}
        except Exception:
            reply = {"error": traceback.format_exc()}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
