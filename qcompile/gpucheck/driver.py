"""The command: lists the rows, has each tried by a worker process, and prints the page."""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qcompile.dump import write_text
from qcompile.gpucheck import numerics, page, speed
from qcompile.gpucheck.device import KINDS, Gpu, bandwidth, find, missing, peak

#: A row: what part it is of, and that part's arguments.
Row = tuple[str, ...]
#: Marks the worker's own lines: libraries print what they like.
_MARK = "\x1erow "
_ROW_SECONDS = 90.0  # of one row at most; the first one of a worker also imports torch


def main(argv: Sequence[str] | None = None) -> int:
    """See :func:`qcompile.gpucheck.main`."""
    given = _parser().parse_args(argv)
    if given.worker:
        _work(find())
        return 0
    gpu = find()
    rows = listing(given.only, given.quick)
    print(f"{len(rows)} rows on {gpu.name if gpu else 'a machine without a GPU'}", file=sys.stderr)
    outcomes = {row: _skipped(row, gpu) for row in rows}
    todo = [row for row in rows if outcomes[row] is None]
    command = worker_command()
    # Numerics may take half of the time: speed is what the others wait for.
    end = time.monotonic() + given.minutes * 60
    for part in ([row for row in todo if row[0] == "numerics"], [row for row in todo if row[0] != "numerics"]):
        share = 0.5 if part and part[0][0] == "numerics" and len(part) < len(todo) else 1.0
        outcomes.update(attempt(part, command, share * (end - time.monotonic()), _ROW_SECONDS, _say))
    text = page.render(gpu, [(row, outcomes[row] or {}) for row in rows])
    print(text)
    if given.out:
        write_text(Path(given.out), text + "\n")
    return int(any((outcomes[row] or {}).get("state") in ("wrong", "failed") for row in rows if row[0] == "numerics"))


def worker_command() -> list[str]:
    """What starts a worker: this Python and this qcompile."""
    return [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-m", "qcompile", "gpu-check", "--worker"]


def listing(only: str | None = None, quick: bool = False) -> list[Row]:
    """All rows there are, for every kind of GPU, the most telling ones first."""
    rows: list[Row] = []
    if only != "speed":
        rows += [("numerics", device, *row) for device in KINDS for row in numerics.rows(device)]
    if only == "numerics":
        return rows
    rows += [("limit", device, what) for device in KINDS for what in ("bandwidth", "peak")]
    # Layer by layer, so that what is left out of time is left out for all that are compared; one of each size first.
    layers = [(at, size, n, k) for size, shapes in speed.LAYERS.items() for at, (n, k) in enumerate(shapes)]
    for device in KINDS:
        for at, size, n, k in sorted(layers, key=lambda layer: layer[0]):
            if at == 0 or not quick:
                rows += [("speed", device, contender, size, str(n), str(k)) for contender in speed.contenders(device)]
    return rows


def try_row(row: Row, gpu: Gpu) -> dict[str, Any]:
    """Try one row here; never raises but for what ends the process."""
    part, device, *rest = row
    try:
        if part == "numerics":
            found = numerics.check(rest[0], rest[1], rest[2], device)
            return {"state": "wrong" if found["wrong"] else "ok", **found}
        if part == "limit":
            return {"state": "ok", "value": bandwidth(device) if rest[0] == "bandwidth" else peak(device)}
        return {"state": "ok", **speed.measure(rest[0], int(rest[2]), int(rest[3]), gpu)}
    except LookupError as error:
        return {"state": "skipped", "why": _short(error)}
    except Exception as error:
        return {"state": "failed", "why": f"{type(error).__name__}: {_short(error)}"}


def attempt(
    rows: Sequence[Row], command: Sequence[str], budget: float, row_seconds: float,
    say: Callable[[Row, dict[str, Any]], None] = lambda row, outcome: None,
) -> dict[Row, dict[str, Any]]:  # fmt: skip
    """Have workers try the rows, within ``budget`` seconds in all.

    One that dies, or takes longer than ``row_seconds``, is replaced by another, which goes on after the row it was at.
    """
    outcomes: dict[Row, dict[str, Any]] = {}
    end = time.monotonic() + budget
    left = list(rows)
    while left and time.monotonic() < end:
        with _Worker(command) as worker:
            while left and time.monotonic() < end:
                allowed = min(row_seconds, max(1.0, end - time.monotonic()))
                outcome = worker.ask(left[0], allowed)
                if outcome.get("late") and allowed < row_seconds:
                    outcome = {"state": "skipped", "why": "out of time", "broken": True}
                outcomes[left[0]] = outcome
                say(left[0], outcome)
                left.pop(0)
                if outcome.get("broken"):
                    break
    for row in left:
        outcomes[row] = {"state": "skipped", "why": "out of time"}
        say(row, outcomes[row])
    return outcomes


class _Worker:
    """A process that takes rows as lines and gives outcomes as lines."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._read_errors, daemon=True).start()

    def _read(self) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                if line.startswith(_MARK):
                    self._lines.put(line.removeprefix(_MARK))
        self._lines.put(None)

    def _read_errors(self) -> None:
        if self._process.stderr is not None:
            for line in self._process.stderr:
                self._errors = [*self._errors[-20:], line]

    def ask(self, row: Row, timeout: float) -> dict[str, Any]:
        """One row's outcome; ``broken`` where the worker is of no use any more."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(json.dumps(row) + "\n")
                self._process.stdin.flush()
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return {"state": "failed", "why": f"no answer in {timeout:.0f} s", "broken": True, "late": True}
        except OSError:
            line = None
        if line is None:
            self._process.wait(timeout=10)
            last = next((text.strip() for text in reversed(self._errors) if text.strip()), "")
            why = f"the process ended with {self._process.returncode}: {last[:150]}"
            return {"state": "failed", "why": why, "broken": True}
        outcome: dict[str, Any] = json.loads(line)
        return outcome

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _work(gpu: Gpu | None) -> None:
    """The worker: rows from standard input, outcomes to standard output, until there are no more."""
    for line in sys.stdin:
        row = tuple(json.loads(line))
        outcome: dict[str, Any] = {"state": "skipped", "why": missing(row[1])}
        if gpu is not None:
            outcome = try_row(row, gpu)
        # After an error of the device nothing else can run in this process.
        words = ("CUDA error", "HIP error", "Accelerator")
        outcome["broken"] = outcome["state"] == "failed" and any(word in str(outcome.get("why", "")) for word in words)
        print(_MARK + json.dumps(outcome), flush=True)


def _skipped(row: Row, gpu: Gpu | None) -> dict[str, Any] | None:
    if gpu is not None and gpu.device == row[1]:
        return None
    outcome = {"state": "skipped", "why": missing(row[1])}
    _say(row, outcome)
    return outcome


def _say(row: Row, outcome: dict[str, Any]) -> None:
    print(f"{outcome['state']:8} {' '.join(row)}{': ' + outcome['why'] if outcome.get('why') else ''}", file=sys.stderr)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qcompile gpu-check", description="Check and time the GPU kernels.")
    parser.add_argument("--only", choices=("numerics", "speed"), help="one of the two parts")
    parser.add_argument("--quick", action="store_true", help="one layer of each size")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so long; rows left say so (default: 9)")
    parser.add_argument("--out", metavar="FILE", help="write the page here, too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser
