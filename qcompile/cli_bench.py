"""``qcompile bench``: one program as float and quantized, both compiled, run in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompile.export import compile_exported
from qcompile.progress import progress_bar, stage
from qcompile.report import report
from qcompile.report_text import size

__all__ = ["compare"]


def compare(program: ExportedProgram, quantized: ExportedProgram, name: str, runs: int) -> str:
    """Time both on the example inputs that the program holds, and return a table.

    Args:
        program: the float program.
        quantized: the same, quantized.
        name: what to call the latter.
        runs: how often each is timed; they take turns, so that a slow moment of the machine falls on both.

    Raises:
        ValueError: the program holds no example inputs.
    """
    if program.example_inputs is None:
        raise ValueError("the program holds no example inputs; export and save it with them")
    args, keywords = program.example_inputs
    variants = {"float": _compiled(program), name: compile_exported(quantized)}
    results: dict[str, Any] = {}
    for title, call in variants.items():
        with stage(f"compiling {title}"):
            results[title] = call(*args, **keywords)
            call(*args, **keywords)
    times: dict[str, list[float]] = {title: [] for title in variants}
    bar = progress_bar()
    turns = range(runs)
    for _ in turns if bar is None else bar(turns, "timing"):
        for title, call in variants.items():
            start = time.perf_counter()
            call(*args, **keywords)
            times[title].append(time.perf_counter() - start)
    base = median(times["float"])
    totals = report(quantized).totals
    held = {"float": totals.float_bytes, name: totals.bytes}
    rows = [f"{'':12}{'median ms':>12}{'best ms':>12}{'speed':>9}{'weights':>12}"]
    for title, measured in times.items():
        middle = median(measured)
        rows.append(f"{title:12}{middle * 1e3:12.3f}{min(measured) * 1e3:12.3f}{base / middle:8.2f}×{size(held[title]):>12}")
    rows.append(f"outputs: {_difference(results['float'], results[name]):.2%} apart; {runs} runs each, in turns")
    return "\n".join(rows)


def _compiled(program: ExportedProgram) -> Callable[..., Any]:
    compiled = torch.compile(program.module(), fullgraph=True)

    def call(*args: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return compiled(*args, **keywords)

    return call


def _difference(wanted: Any, got: Any) -> float:
    """``|got - wanted| / |wanted|`` over all float tensors of two results."""
    pairs = zip(torch.utils._pytree.tree_leaves(wanted), torch.utils._pytree.tree_leaves(got), strict=True)
    floats = [(a.double(), b.double()) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point()]
    norm = sum(float(a.square().sum()) for a, _ in floats)
    error = sum(float((b - a).square().sum()) for a, b in floats)
    return (error / norm) ** 0.5 if norm else 0.0
