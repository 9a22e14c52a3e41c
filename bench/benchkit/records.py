"""Figures as flat records, kept as JSON, from which every table and plot is made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Record", "Run", "table"]

Case = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One figure: of which case (``{"shape": "4096x4096", "M": 1}``), of which engine, how much of which unit.

    Seconds and their parts (``ms``, ``us``, ``s``) are better when less, rates (``tokens/s``) when more.
    """

    case: Case
    engine: str
    value: float
    unit: str

    @property
    def less_is_better(self) -> bool:
        """Whether the unit is one of time."""
        return self.unit in ("s", "ms", "us")


@dataclass
class Run:
    """What one script measured: its name, the command that repeats it, the machine, the peers, the records."""

    bench: str
    command: str
    machine: dict[str, str]
    peers: dict[str, str]
    records: list[Record]

    def find(self, engine: str, **case: Any) -> Record | None:
        """The first record of an engine whose case holds all of ``case``."""
        for record in self.records:
            if record.engine == engine and all(record.case.get(k) == v for k, v in case.items()):
                return record
        return None

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        scratch.replace(path)

    @staticmethod
    def load(path: Path) -> Run:
        """Read what :meth:`save` wrote. Raises ValueError when it is something else."""
        try:
            fields = json.loads(path.read_text("utf-8"))
            fields["records"] = [Record(**record) for record in fields["records"]]
            return Run(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no figures of bench/: {error!r}; measure again") from error


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, its first column to the left and the others to the right."""
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
