"""The report: what became of every matmul-like operator, or why nothing did."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from qcompile import history
from qcompile.eager.rows import rows_of_module
from qcompile.passes.decision import Decision
from qcompile.passes.pipeline import Result

__all__ = ["Part", "Report", "Totals", "report", "rows_of"]


@dataclass(frozen=True)
class Part:
    """The rows of one graph.

    Attributes:
        label: where the graph came from.
        rows: one for each matmul-like operator.
        passes: what each pass did, where that is known.
    """

    label: str
    rows: tuple[Decision, ...]
    passes: tuple[Result, ...] = ()


@dataclass(frozen=True)
class Totals:
    """Sums over the rows; a weight that several operators or graphs read is counted once.

    Attributes:
        quantized: operators that work on codes.
        left_alone: operators with a constant weight that stay float.
        activations: products without a constant weight.
        float_bytes: bytes of all these weights as they came.
        bytes: bytes of codes, scales and zero points, and of the weights that were left alone.
        quantized_float_bytes, quantized_bytes: the same of quantized weights only.
    """

    quantized: int
    left_alone: int
    activations: int
    float_bytes: int
    bytes: int
    quantized_float_bytes: int
    quantized_bytes: int

    @property
    def ratio(self) -> float | None:
        """``bytes / float_bytes``; None where there is no weight."""
        return self.bytes / self.float_bytes if self.float_bytes else None


@dataclass(frozen=True)
class Report:
    """What :func:`report` returns: ``print`` it, or take :attr:`rows`, :attr:`totals`, :meth:`to_json`, :meth:`to_html`.

    Attributes:
        parts: the graphs, in the order in which they were made.
    """

    parts: tuple[Part, ...] = field(default_factory=tuple)

    @property
    def rows(self) -> list[Decision]:
        """The rows of all graphs; an operator that stands the same in several graphs is there once."""
        seen: set[tuple[object, ...]] = set()
        kept = []
        for part in self.parts:
            here: set[tuple[object, ...]] = set()
            count: dict[tuple[object, ...], int] = {}
            for row in part.rows:
                said = (row.scheme, row.kernel, row.reason, row.activations)
                key = (row.weight, row.module, row.op, row.shape, row.shared, *said)
                count[key] = count.get(key, 0) + 1
                here.add((*key, count[key]))
                if (*key, count[key]) not in seen:
                    kept.append(row)
            seen |= here
        return kept

    @property
    def totals(self) -> Totals:
        """Counts and bytes over :attr:`rows`."""
        rows = self.rows
        held: dict[tuple[object, ...], Decision] = {}
        floats: dict[str, int] = {}
        for part in self.parts:
            count: dict[tuple[object, ...], int] = {}
            for row in part.rows:
                if not row.weight or row.shared:
                    continue
                # One weight may be held twice in a graph (in two orientations), and in the next graph so again.
                key = (row.weight, row.scheme, row.shape)
                count[key] = count.get(key, 0) + 1
                held.setdefault((*key, count[key]), row)
                floats[row.weight] = max(floats.get(row.weight, 0), row.float_bytes)
        stored = list(held.values())
        coded = {r.weight for r in stored if r.quantized}
        return Totals(
            quantized=sum(r.quantized for r in rows),
            left_alone=sum(not r.quantized and bool(r.weight) for r in rows),
            activations=sum(not r.quantized and not r.weight for r in rows),
            float_bytes=sum(floats.values()),
            bytes=sum(r.bytes for r in stored),
            quantized_float_bytes=sum(size for name, size in floats.items() if name in coded),
            quantized_bytes=sum(r.bytes for r in stored if r.quantized),
        )

    def __str__(self) -> str:
        from qcompile.report_text import render

        return render(self)

    def _repr_html_(self) -> str:
        from qcompile.report_html import table

        return table(self)

    def to_json(self, indent: int | None = None) -> str:
        """The report as JSON: ``{"version", "totals", "graphs": [{"label", "passes", "rows"}]}``; bytes are numbers."""
        totals = self.totals
        document = {
            "version": 1,
            "totals": {**{k: getattr(totals, k) for k in Totals.__dataclass_fields__}, "ratio": totals.ratio},
            "graphs": [
                {
                    "label": part.label,
                    "passes": [{"name": p.name, "matches": p.matches, "seconds": p.seconds} for p in part.passes],
                    "rows": [_row(r) for r in part.rows],
                }
                for part in self.parts
            ],
        }
        return json.dumps(document, indent=indent, allow_nan=False)

    def to_html(self, title: str = "qcompile report") -> str:
        """The report as one page that needs nothing else."""
        from qcompile.report_html import page

        return page(self, title)


def report(subject: ExportedProgram | nn.Module | Callable[..., Any] | str | Path | None = None) -> Report:
    """Say of every matmul-like operator how it was quantized, or why it was not.

    Args:
        subject: an exported program or a module that :func:`qcompile.quantize` returned; a module or function compiled with
            ``torch.compile(..., backend="qcompile")`` that has run at least once; the folder that :func:`qcompile.save`
            wrote; or None for everything that this process has compiled.

    Raises:
        ValueError: nothing is known about ``subject``: it was never quantized, or never run.
        TypeError: ``subject`` is none of these.

    Example:
        >>> import qcompile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)).eval()
        >>> quantized = qcompile.quantize(torch.export.export(model, (torch.randn(3, 64),)), weights="qint8")
        >>> rows = report(quantized).rows
        >>> [(r.weight, r.shape, r.quantized) for r in rows]
        [('0.weight', (128, 64), True), ('1.weight', (64, 128), True)]
        >>> report(quantized).totals.ratio < 0.27
        True
    """
    if isinstance(subject, ExportedProgram):
        rows = tuple(rows_of(subject.graph))
        if not rows and not _carries(subject.graph):
            raise ValueError(
                "this exported program carries no report: it is not what qcompile.quantize returned. Reports of programs "
                "that were changed by other tools after quantizing may be lost"
            )
        return Report((Part("export", rows),))
    if isinstance(subject, (str, Path)):
        from qcompile.serialization import read_report

        return read_report(Path(subject))
    if subject is None:
        return _of_graphs(history.graphs(), "nothing was compiled in this process yet")
    if not callable(subject):
        raise TypeError(
            "qcompile.report takes an exported program, a compiled module or function, or a folder written by "
            f"qcompile.save, got {type(subject).__name__}"
        )
    if isinstance(subject, nn.Module) and not hasattr(subject, "_orig_mod"):
        eager = rows_of_module(subject)
        if eager:
            return Report((Part("module", tuple(eager)),))
    return _of_graphs(
        _compiled(subject),
        "nothing was compiled by qcompile for it yet: call torch.compile(..., backend='qcompile'), and run it once",
    )


def rows_of(graph: fx.Graph) -> Iterator[Decision]:
    """The report rows that an exported graph carries."""
    for values in _carried(graph):
        yield from (Decision.from_dict(d) for d in values)


def sqnr(row: Decision) -> float | None:
    """Signal to quantization noise of the weight in dB; infinite where nothing was lost, None where left alone."""
    if row.error is None:
        return None
    return math.inf if row.error == 0 else -20 * math.log10(row.error)


def _carries(graph: fx.Graph) -> bool:
    return next(_carried(graph), None) is not None


def _carried(graph: fx.Graph) -> Iterator[list[dict[str, Any]]]:
    for node in graph.nodes:
        custom = node.meta.get("custom")
        held = custom.get("qcompile") if isinstance(custom, dict) else None
        if held:
            yield held["decisions"]
            return


def _row(row: Decision) -> dict[str, Any]:
    values = {**row.to_dict(), "sqnr_db": sqnr(row)}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _of_graphs(graphs: Sequence[history.Graph], otherwise: str) -> Report:
    if not graphs:
        raise ValueError(f"no report: {otherwise}")
    return Report(tuple(Part(g.label, tuple(g.decisions), tuple(g.results)) for g in graphs))


def _compiled(subject: Callable[..., Any]) -> list[history.Graph]:
    """The graphs that were compiled for a module, or for a function: those that read weights that it can reach."""
    modules = list(_modules(subject))
    if not modules:
        return history.graphs()
    found: list[history.Graph] = []
    for module in modules:
        found += [g for g in history.graphs(module) if all(g is not f for f in found)]
    return found


def _modules(subject: Any) -> Iterable[nn.Module]:
    if isinstance(subject, nn.Module):
        return [getattr(subject, "_orig_mod", subject)]
    function = getattr(subject, "_torchdynamo_orig_callable", subject)
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        return [owner]
    function = inspect.unwrap(function)
    try:
        seen = inspect.getclosurevars(function)
    except TypeError:
        return []
    return [m for m in {**seen.globals, **seen.nonlocals}.values() if isinstance(m, nn.Module)]
