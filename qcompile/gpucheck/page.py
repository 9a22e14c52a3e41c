"""The outcome as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qcompile.gpucheck.device import Gpu

_GOALS = (
    "at least 85 % of the measured bandwidth at M=1 on layers of 8192 and up",
    "at least 1.5 times float16 at M=64",
    "never slower than float16, at any M",
)
Outcomes = Sequence[tuple[tuple[str, ...], Mapping[str, Any]]]


def render(gpu: Gpu | None, outcomes: Outcomes) -> str:
    """The whole page."""
    parts = ["# qcompile gpu-check", "", _machine(gpu), ""]
    device = gpu.device if gpu else None
    here = [(row, outcome) for row, outcome in outcomes if row[1] == device]
    limits = {row[2]: outcome.get("value") for row, outcome in here if row[0] == "limit"}
    numerics = [(row, outcome) for row, outcome in here if row[0] == "numerics"]
    speed = [(row, outcome) for row, outcome in here if row[0] == "speed"]
    if numerics:
        parts += ["## Numerics against float64", "", *_numerics(numerics), ""]
    if speed:
        parts += ["## Speed", "", *_limits(limits), "", *_speed(speed, limits), "", *_goals(speed, limits), ""]
    parts += _left_out([(row, outcome) for row, outcome in outcomes if outcome.get("state") in ("skipped", "failed")])
    return "\n".join(parts).rstrip()


def _machine(gpu: Gpu | None) -> str:
    versions = f"torch {torch.__version__}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    try:
        import triton

        versions += f", Triton {triton.__version__}"
    except ImportError:
        pass
    from qcompile.kernels.cuda.build import compiler

    return f"{gpu.name if gpu else 'No GPU'}; {versions}; CUDA compiler: {compiler() or 'none'}"


def _numerics(rows: Outcomes) -> list[str]:
    lines = ["| kernel | operator | scheme | float16 | bfloat16 | float32 | |", "|" + " --- |" * 7]
    for row, outcome in rows:
        errors = outcome.get("errors", {})
        cells = [_error(errors.get(name)) for name in ("float16", "bfloat16", "float32")]
        state = outcome["state"] if outcome["state"] in ("ok", "wrong") else f"{outcome['state']}: {outcome.get('why', '')}"
        lines.append(f"| {' | '.join([*row[2:], *cells])} | {_cell('**WRONG**' if state == 'wrong' else state)} |")
    return lines


def _error(value: object) -> str:
    return "" if value is None else f"{value:.1e}" if isinstance(value, float) else _cell(str(value))


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _limits(limits: Mapping[str, Any]) -> list[str]:
    bandwidth, peak = limits.get("bandwidth"), limits.get("peak")
    said = f"{bandwidth / 1e9:.0f} GB/s of a copy" if bandwidth else "bandwidth not measured"
    return [f"Measured: {said}, {f'{peak / 1e12:.1f} Tflop/s of a float16 product' if peak else 'peak not measured'}."]


def _seconds(outcome: Mapping[str, Any]) -> dict[int, float]:
    return {int(m): s for m, s in outcome.get("seconds", {}).items() if isinstance(s, float)}


def _speed(rows: Outcomes, limits: Mapping[str, Any]) -> list[str]:
    """A line a layer and M: microseconds, and for ours the fractions of the measured limits."""
    names = list(dict.fromkeys(row[2] for row, _ in rows))
    times = {(row[2], *row[3:]): _seconds(outcome) for row, outcome in rows}
    nbytes = {(row[2], *row[3:]): outcome.get("bytes", 0) for row, outcome in rows}
    layers = list(dict.fromkeys(row[3:] for row, _ in rows))
    head = ["model", "N x K", "M", *(f"{name} us" for name in names), "qint4: times float16", "of bandwidth", "of peak"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for layer in layers:
        for m in sorted({m for name in names for m in times[(name, *layer)]}):
            cells = [f"{times[(name, *layer)][m] * 1e6:.1f}" if m in times[(name, *layer)] else "" for name in names]
            cells += _fractions(times, nbytes, layer, m, limits)
            lines.append(f"| {layer[0]} | {layer[1]} x {layer[2]} | {m} | {' | '.join(cells)} |")
    return lines


def _fractions(
    times: Mapping[Any, dict[int, float]], nbytes: Mapping[Any, int], layer: tuple[str, ...], m: int,
    limits: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    ours = times.get(("qint4", *layer), {}).get(m)
    if ours is None:
        return ["", "", ""]
    n, k = int(layer[1]), int(layer[2])
    half, bandwidth, peak = times.get(("float16", *layer), {}).get(m), limits.get("bandwidth"), limits.get("peak")
    return [
        f"{half / ours:.2f}" if half else "",
        f"{_traffic(nbytes[('qint4', *layer)], m, n, k) / ours / bandwidth:.0%}" if bandwidth else "",
        f"{2 * m * n * k / ours / peak:.0%}" if peak else "",
    ]


def _traffic(weight: int, m: int, n: int, k: int) -> int:
    return weight + 2 * m * (n + k)


def _goals(rows: Outcomes, limits: Mapping[str, Any]) -> list[str]:
    """Each goal, and whether it was met by qint4 and qint8 as dispatched; these are goals, not results."""
    times = {(row[2], *row[3:]): _seconds(outcome) for row, outcome in rows}
    nbytes = {(row[2], *row[3:]): outcome.get("bytes", 0) for row, outcome in rows}
    fractions: list[float] = []
    at_64: list[float] = []
    everywhere: list[float] = []
    for (name, size, n, k), ours in times.items():
        if name not in ("qint4", "qint8"):
            continue
        half = times.get(("float16", size, n, k), {})
        if min(int(n), int(k)) >= 8192 and 1 in ours and limits.get("bandwidth"):
            fractions.append(_traffic(nbytes[name, size, n, k], 1, int(n), int(k)) / ours[1] / limits["bandwidth"])
        ratios = {m: half[m] / ours[m] for m in ours if m in half}
        everywhere += ratios.values()
        at_64 += [ratios[64]] if name == "qint4" and 64 in ratios else []
    found = [(fractions, 0.85), (at_64, 1.5), (everywhere, 1.0)]
    lines = ["Goals:", ""]
    for goal, (values, least) in zip(_GOALS, found, strict=True):
        met = sum(v >= least for v in values)
        lines.append(f"- {goal}: " + (f"{met} of {len(values)}, the least {min(values):.2f}" if values else "not measured"))
    return lines


def _left_out(rows: Outcomes) -> list[str]:
    if not rows:
        return []
    lines = ["## Not measured", "", "| row | why |", "| --- | --- |"]
    return [*lines, *(f"| {_cell(' '.join(row))} | {o['state']}: {_cell(str(o.get('why', '')))} |" for row, o in rows)]

