"""Timing in turns: what is compared runs alternately in one process, so that a slow moment falls on all of it alike.

Three things spoil such a comparison if nothing is done about them. The threads of the kind before may still be spinning when
the next one starts, hence the first calls of a turn are not counted, and a pause can be put between turns. After a pause the
processor has slowed down, by a quarter for the next 50 ms: calls that are not counted can go on for a while. And a call of a
few microseconds next to one of 100 ms needs turns of equal time, not of equal counts.
"""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

__all__ = ["WARM", "alternate", "medians", "once", "undisturbed"]

Calls = Mapping[str, Callable[[], object]]

WARM = 0.2
"""Seconds of calls before those that count, where turns begin with a pause: a tenth of a second is not always enough."""

_AROUND = "QCOMPILE_BENCH_AROUND"
_holding = False


def alternate(
    calls: Calls, seconds: float, turn: float = 0.03, pause: float = 0.0, least: int = 3, warm: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each counted call, the kinds taking turns until the time is up.

    Args:
        calls: name to a function without arguments; what it returns is dropped.
        seconds: for all kinds together; a turn that has begun is finished, and each kind has ``least`` counted turns.
        turn: seconds that a turn goes on for; at least one call is counted in each.
        pause: seconds of sleep before each turn, where a kind's threads go on spinning after its last call.
        least: counted turns of each kind.
        warm: seconds of calls that are not counted when a turn begins; one call at least. After a pause a processor takes
            tens of milliseconds to its full rate, which short calls would pay for and long ones would not.

    Raises:
        ValueError: there is nothing to time.
    """
    if not calls:
        raise ValueError("alternate: no calls were given; give at least one")
    times: dict[str, list[float]] = {name: [] for name in calls}
    with undisturbed():
        for call in calls.values():
            call()
        begin, turns = time.perf_counter(), 0
        while turns < least or time.perf_counter() - begin < seconds:
            for name, call in calls.items():
                if pause:
                    time.sleep(pause)
                begun = time.perf_counter()
                call()
                while time.perf_counter() - begun < warm:
                    call()
                start = last = time.perf_counter()
                while True:
                    call()
                    now = time.perf_counter()
                    times[name].append(now - last)
                    last = now
                    if now - start >= turn:
                        break
            turns += 1
    return times


def medians(
    calls: Calls, seconds: float, turn: float = 0.03, pause: float = 0.0, least: int = 3, warm: float = 0.0
) -> dict[str, float]:
    """The median of each kind's calls in seconds; see :func:`alternate`."""
    return {name: statistics.median(t) for name, t in alternate(calls, seconds, turn, pause, least, warm).items()}


def once(call: Callable[[], object]) -> float:
    """Seconds of one call, the first there is: for what happens once, such as compiling."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside the block the command named by ``QCOMPILE_BENCH_AROUND`` runs, if any: ``COMMAND sh -c 'echo; read line'``.

    On a shared machine that command can hold a lock, or keep others from the processor, for as long as what follows it
    runs. It starts its argument when the machine is ours; that prints a line, and ends when the block does. Blocks may be
    nested; the outermost counts.
    """
    global _holding
    around = shlex.split(os.environ.get(_AROUND, ""))
    if not around or _holding:
        yield
        return
    holder = subprocess.Popen([*around, "sh", "-c", "echo ready; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if holder.stdout is None or not holder.stdout.readline():
            raise RuntimeError(f"{_AROUND}={shlex.join(around)!r} ended before it ran what it was given")
        _holding = True
        yield
    finally:
        _holding = False
        if holder.stdin is not None:
            holder.stdin.close()
        holder.wait()
