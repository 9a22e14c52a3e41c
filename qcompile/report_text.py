"""The report as text for a terminal of 120 columns: operators that repeat over layers take one line together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qcompile.passes.decision import Decision
from qcompile.report import Report, sqnr

WIDTH = 120

#: The widest that the first two columns get.
_NAME, _OP = 52, 30


@dataclass
class Line:
    """Rows that differ in nothing but the numbers in their names.

    Attributes:
        name: with the numbers that occur, as in ``layers.{0-29}.mlp.up_proj.weight``.
        rows: what it stands for.
    """

    name: str
    rows: list[Decision] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many operators it stands for."""
        return len(self.rows)

    @property
    def float_bytes(self) -> int:
        """Bytes of the float weights, each once."""
        return sum({r.weight: r.float_bytes for r in self.rows if not r.shared}.values())

    @property
    def bytes(self) -> int:
        """Bytes that are held now."""
        return sum(r.bytes for r in self.rows if not r.shared)

    @property
    def worst(self) -> Decision:
        """The row with the largest error."""
        return max(self.rows, key=lambda r: -1.0 if r.error is None else r.error)


def row_name(row: Decision) -> str:
    """How a row is called: by its weight, else by its module, else by its node."""
    return row.weight or row.module or re.sub(r"_\d+$", "", row.node)


def lines(rows: Iterable[Decision]) -> list[Line]:
    """Rows put together where they differ only in the numbers in their names."""
    groups: dict[tuple[object, ...], list[Decision]] = {}
    for row in rows:
        template = re.sub(r"(?<![^.\[])\d+(?![^.\]])", "{}", row_name(row))
        key = (template, row.op, row.shape, row.scheme, row.kernel, row.reason, row.float_bytes, row.shared)
        groups.setdefault(key, []).append(row)
    return [Line(_name([row_name(r) for r in group], str(key[0])), group) for key, group in groups.items()]


def sections(rows: Iterable[Decision]) -> dict[str, list[Line]]:
    """Lines by what was done: a heading for each scheme and kernel, then one for each reason to leave alone."""
    done: dict[str, list[Decision]] = {}
    left: dict[str, list[Decision]] = {}
    for row in rows:
        if row.quantized:
            rounded = f", activations {row.activations}" if row.activations else ""
            done.setdefault(f"{row.scheme} by {row.kernel or 'no kernel yet'}{rounded}", []).append(row)
        else:
            left.setdefault(f"left alone: {row.reason or 'no reason given'}", []).append(row)
    return {heading: lines(group) for heading, group in {**done, **left}.items()}


def render(report: Report) -> str:
    """The whole report."""
    head = ("", "operator", "shape", "before → after", "ratio", "error", "SQNR dB")
    table: list[tuple[str, ...] | str] = []
    for heading, group in sections(report.rows).items():
        table += ["", heading]
        table += [cells(line) for line in group]
    if not table:
        return "no matmul-like operator in the program"
    wide = [head, *(row for row in table if isinstance(row, tuple))]
    widths = [max(len(row[i]) for row in wide) for i in range(len(head))]
    spare = WIDTH - sum(widths[2:]) - 2 * len(widths)
    widths[1] = min(widths[1], _OP)
    widths[0] = max(24, min(widths[0], spare - widths[1]))
    shown = [_row(head, widths)]
    for entry in table:
        shown.append(entry if isinstance(entry, str) else _row(entry, widths))
    return "\n".join([*shown, "", *footer(report)])


def footer(report: Report) -> list[str]:
    """The totals, in words."""
    totals = report.totals
    text = [
        f"{totals.quantized} operators quantized, {totals.left_alone} with a weight left alone, "
        f"{totals.activations} products of activations" + (f"; {len(report.parts)} graphs" if len(report.parts) > 1 else "")
    ]
    if totals.float_bytes:
        text.append(
            f"weights {size(totals.float_bytes)} → {size(totals.bytes)} ({totals.ratio:.3f})"
            + (
                f"; the quantized ones {size(totals.quantized_float_bytes)} → {size(totals.quantized_bytes)}"
                if totals.quantized and totals.left_alone
                else ""
            )
        )
    if any(r.error is not None for r in report.rows):
        text.append("error: |dequantized - float| / |float|, the worst where a line stands for several weights")
    return text


def cells(line: Line) -> tuple[str, ...]:
    """The columns of one line."""
    worst = line.worst
    first = line.rows[0]
    name = line.name + (f" ×{line.count}" if line.count > 1 else "")
    shape = "×".join(map(str, first.shape))
    if first.shared:
        return (name, first.op, shape, "shared", "", "", "")
    before, after = line.float_bytes, line.bytes
    held = f"{size(before)} → {size(after)}" if first.quantized else (size(before) if before else "")
    ratio = f"{after / before:.3f}" if first.quantized and before else ""
    noise = sqnr(worst)
    return (
        name,
        first.op,
        shape,
        held,
        ratio,
        "" if worst.error is None else f"{worst.error:.2%}",
        "" if noise is None else f"{noise:.1f}",
    )


def size(count: int) -> str:
    """Bytes with a binary prefix."""
    if count < 1024:
        return f"{count} B"
    value, units = count / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.{max(0, 2 - len(str(int(value))))}f} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ``0-3,5``."""
    ordered = sorted(set(numbers))
    text: list[str] = []
    start = previous = ordered[0]
    for number in [*ordered[1:], None]:
        if number is None or number != previous + 1:
            text.append(str(start) if start == previous else f"{start}-{previous}")
            start = number if number is not None else start
        previous = number if number is not None else previous
    return ",".join(text)


def _name(names: Sequence[str], template: str) -> str:
    """The template with the numbers that occur in each of its places."""
    pattern = re.compile("(\\d+)".join(re.escape(part) for part in template.split("{}")))
    found = [match.groups() for name in names if (match := pattern.fullmatch(name))]
    if not found:
        return names[0]
    text = template.split("{}")
    named = text[0]
    for place, rest in zip(zip(*found, strict=True), text[1:], strict=True):
        numbers = ranges(int(n) for n in place)
        named += (numbers if numbers.isdigit() else f"{{{numbers}}}") + rest
    return named


def _row(columns: Sequence[str], widths: Sequence[int]) -> str:
    name, op, shape, *numbers = columns
    left = [_fit(name, widths[0]).ljust(widths[0]), _fit(op, widths[1]).ljust(widths[1]), shape.ljust(widths[2])]
    right = [number.rjust(width) for number, width in zip(numbers, widths[3:], strict=True)]
    return "  " + "  ".join([*left, *right]).rstrip()


def _fit(text: str, width: int) -> str:
    """A text cut in the middle where it is too long; both ends of a parameter's name say something."""
    if len(text) <= width:
        return text
    keep = width - 1
    return f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
