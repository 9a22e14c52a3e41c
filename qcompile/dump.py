"""Debug dumps: ``QCOMPILE_DUMP=DIR`` writes what each pass did, as text, and as pages that open from disk.

For each graph there is a folder ``DIR/graph-NNN-origin`` with ``NN.<pass>.before.txt``, ``NN.<pass>.after.txt``,
``NN.<pass>.diff``, ``passes.json``, ``report.json``, ``report.html`` and ``index.html``; ``DIR/index.html`` holds them all.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qcompile.dump_text import Snapshot, changes
from qcompile.passes.base import Pass
from qcompile.passes.pipeline import Result
from qcompile.passes.program import Program
from qcompile.report import Part, Report

__all__ = ["VARIABLE", "Dump", "Step", "observer", "use_folder", "write_text"]

#: The environment variable that names the folder.
VARIABLE = "QCOMPILE_DUMP"


@dataclass
class Step:
    """One pass: the program before and after it.

    Attributes:
        one: the pass.
        before, after: the states of the program; ``after`` is None while it runs and where it failed.
        result: its time and matches.
        error: what it raised.
    """

    one: Pass
    before: Snapshot
    after: Snapshot | None = None
    result: Result | None = None
    error: str | None = None


@dataclass
class Dump:
    """Writes one graph's passes to a folder; an observer of :func:`qcompile.passes.pipeline.run`.

    Attributes:
        folder: where to.
        origin: which front end the graph came from: ``export``, ``lower``, ``compile``.
        options: what the user asked for, as text.
        steps: the passes so far.
    """

    folder: Path
    origin: str
    options: str = ""
    steps: list[Step] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name, which is the graph's."""
        return self.folder.name

    def before(self, one: Pass, program: Program) -> None:
        """Write the state that ``one`` starts from."""
        step = Step(one, Snapshot.of(program))
        self.steps.append(step)
        write_text(self._file("before.txt"), self._text(step.before))

    def after(self, one: Pass, program: Program, result: Result) -> None:
        """Write the state that ``one`` left, and how it differs."""
        step = self.steps[-1]
        step.after, step.result = Snapshot.of(program), result
        write_text(self._file("after.txt"), self._text(step.after))
        names = (f"before {result.name}", f"after {result.name}")
        diff = difflib.unified_diff(step.before.lines(), step.after.lines(), *names, lineterm="")
        write_text(self._file("diff"), "\n".join(diff) + "\n")
        self._record()

    def failed(self, one: Pass, program: Program, error: Exception) -> None:
        """Write why ``one`` failed, and the pages as far as the graph came."""
        self.steps[-1].error = f"{type(error).__name__}: {error}"
        self._record()
        self.done(program)

    def done(self, program: Program) -> None:
        """Write the report and the pages."""
        from qcompile.dump_html import write_pages

        results = tuple(s.result for s in self.steps if s.result is not None)
        report = Report((Part(self.name, tuple(program.decisions), results),))
        write_text(self.folder / "report.json", report.to_json(indent=1))
        write_text(self.folder / "report.html", report.to_html(f"{self.name}: report"))
        write_pages(self, report)

    def _file(self, suffix: str) -> Path:
        number = len(self.steps) - 1
        return self.folder / f"{number:02}.{self.steps[-1].one.text_name()}.{suffix}"

    def _text(self, snapshot: Snapshot) -> str:
        return "\n".join(snapshot.lines()) + "\n"

    def _record(self) -> None:
        rows = []
        for number, step in enumerate(self.steps):
            row: dict[str, Any] = {"number": number, "pass": step.one.text_name(), "name": str(step.one)}
            if step.result is not None and step.after is not None:
                gone, new, changed = changes(step.before.items, step.after.items)
                row |= {"matches": step.result.matches, "seconds": step.result.seconds}
                row |= {"lines_removed": gone, "lines_added": new, "lines_changed": changed}
            if step.error is not None:
                row["error"] = step.error
            rows.append(row)
        document = {"graph": self.name, "origin": self.origin, "options": self.options, "passes": rows}
        write_text(self.folder / "passes.json", json.dumps(document, indent=1))


def observer(origin: str, options: Any = None) -> Dump | None:
    """What writes the dump of the next graph, or None unless ``QCOMPILE_DUMP`` names a folder.

    Args:
        origin: which front end the graph comes from; part of the folder's name.
        options: the user's options, to be shown.

    Raises:
        ValueError: the folder cannot be written to; said before any work is done.
    """
    named = os.environ.get(VARIABLE)
    return dump_to(named, origin, options) if named else None


@contextmanager
def use_folder(folder: str | Path) -> Iterator[None]:
    """Dump to ``folder`` whatever is quantized or compiled inside the block, as ``QCOMPILE_DUMP`` does."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def dump_to(root: str | Path, origin: str, options: Any = None) -> Dump:
    """A dump of the next graph in the folder ``root``; see :func:`observer`."""
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = _next_folder(root, origin)
        write_text(folder / "passes.json", "{}\n")
    except OSError as error:
        raise ValueError(
            f"{VARIABLE}={str(root)!r}: cannot write there ({error}); name a folder that is writable"
        ) from error
    return Dump(folder, origin, _shown(options, always=() if origin == "lower" else ("weights",)))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _next_folder(root: Path, origin: str) -> Path:
    """A new folder with the next free number; several processes may write to one dump."""
    taken = [int(p.name[6:9]) for p in root.glob("graph-[0-9][0-9][0-9]-*")]
    number = max(taken, default=-1) + 1
    while True:
        folder = root / f"graph-{number:03}-{origin}"
        try:
            if not list(root.glob(f"graph-{number:03}-*")):
                folder.mkdir()
                return folder
        except FileExistsError:
            pass
        number += 1


def _shown(options: Any, always: tuple[str, ...]) -> str:
    """Options that differ from the defaults, and those named in ``always``."""
    if options is None or not hasattr(options, "__dataclass_fields__"):
        return ""
    values = ((f.name, getattr(options, f.name), f.default) for f in fields(options))
    return ", ".join(f"{name}={value}" for name, value, default in values if value != default or name in always)
