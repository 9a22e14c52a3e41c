"""Tables of text, aligned, for the terminal and for pasting into Markdown."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["megabytes", "table"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up; the first column is left aligned, the others right.

    Raises:
        ValueError: a row has more or fewer cells than the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the head {len(head)}")
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, rest = cells[0].ljust(widths[0]), [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]) + " |"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def megabytes(count: float | None) -> str:
    """A number of bytes in units of 10^6, or a dash for None."""
    return "–" if count is None else f"{count / 1e6:,.0f}"
