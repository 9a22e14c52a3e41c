"""``qcompile passes``: passes by their text names, listed, or run on a saved graph."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompile.capture_export import from_exported, to_exported
from qcompile.dump import observer
from qcompile.dump_text import Snapshot, changes
from qcompile.export import annotate
from qcompile.kernels.dtypes import QType, qtype
from qcompile.passes.base import Pass
from qcompile.passes.pipeline import PASSES, run
from qcompile.report import rows_of

__all__ = ["listing", "parse", "run_on"]


def listing() -> str:
    """All passes in the order of the pipeline, with what they do and their options."""
    lines = []
    for name, kind in PASSES.items():
        lines.append(f"{name:18} {(inspect.getdoc(kind) or '').splitlines()[0].rstrip(':')}")
        lines += [f"{'':20}{f.name}={f.default}" for f in fields(kind)]
    return "\n".join(lines)


def parse(text: str) -> Pass:
    """The pass that ``str()`` prints as ``text``: a name, and options in braces.

    Raises:
        ValueError: an unknown pass or option, or a value of the wrong kind.

    Example:
        >>> parse("select{weights=qint4,group_size=64}").group_size
        64
    """
    match = re.fullmatch(r"([\w-]+)(?:\{(.*)\})?", text)
    if match is None or match.group(1) not in PASSES:
        raise ValueError(f"no pass {text!r}; the passes are {', '.join(PASSES)}")
    kind = PASSES[match.group(1)]
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    given: dict[str, Any] = {}
    for option in re.findall(r"[^,(]+(?:\([^)]*\))?", match.group(2) or ""):
        name, _, value = option.strip().partition("=")
        if name not in known:
            raise ValueError(f"{match.group(1)} has no option {name!r}; it has {', '.join(known) or 'none'}")
        given[name] = _value(name, value, hints[name])
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in given]
    if missing:
        raise ValueError(f"{match.group(1)} needs {', '.join(missing)}")
    return kind(**given)


def run_on(program: ExportedProgram, chosen: Sequence[Pass], show: bool = False) -> tuple[str, ExportedProgram]:
    """Run passes on a copy of an exported program.

    Args:
        show: append the graph as it stands at the end.

    Returns:
        What each pass did, as text; and the resulting program.
    """
    held = from_exported(program)
    held.decisions = list(rows_of(held.graph))
    watcher = observer("passes")
    lines = []
    for one in chosen:
        before = Snapshot.of(held)
        (result,) = run([one], held, watcher)
        gone, new, changed = changes(before.items, Snapshot.of(held).items)
        lines.append(f"{result.name}: {result.matches} matches in {result.seconds:.3f} s; lines −{gone} +{new} ~{changed}")
        if one.text_name() in ("select", "quantize-weights") and not held.sites:
            lines.append("  it works on what canonicalize finds; run `canonicalize` before it")
    if held.decisions:
        annotate(held)
    if show:
        lines += ["", *Snapshot.of(held).lines()]
    return "\n".join(lines), to_exported(held, program)


def _value(name: str, text: str, hint: Any) -> Any:
    """The value that a text means for a field of this type."""
    kinds = [k for k in (typing.get_args(hint) or (hint,)) if k is not type(None)]
    if text == "None":
        return None
    try:
        if QType in kinds:
            return qtype(text)
        if torch.dtype in kinds:
            return {str(d): d for d in (torch.float32, torch.float16, torch.bfloat16)}[
                f"torch.{text.removeprefix('torch.')}"
            ]
        if hint is bool:
            return {"True": True, "False": False}[text]
        if int in kinds:
            return int(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name}={text}: {error}") from error
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip(" '\"") for part in text.strip("()").split(",") if part.strip())
    allowed = [v for k in kinds for v in typing.get_args(k)] or [k for k in kinds if isinstance(k, str)]
    if allowed and text not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {text!r}")
    return text
