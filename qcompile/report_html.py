"""The report as a page, and as a table to put into other pages and notebooks."""

from __future__ import annotations

import re

from qcompile.report import Part, Report, sqnr
from qcompile.report_text import Line, cells, footer, row_name, sections, size
from qcompile.web import escape, tag
from qcompile.web import page as web_page

__all__ = ["page", "table"]

_HEAD = ("weight or module", "operator", "shape", "before → after", "ratio", "error", "SQNR dB")


def page(report: Report, title: str) -> str:
    """The report as one page."""
    body = tag("h1", escape(title)) + table(report)
    for part in report.parts:
        if part.passes:
            body += tag("h2", f"Passes of {escape(part.label)}") + passes(part)
    return web_page(title, tag("main", body))


def table(report: Report) -> str:
    """The report as a table with a summary above it."""
    rows = [tag("tr", "".join(tag("th", escape(h), "n" if i > 2 else "") for i, h in enumerate(_HEAD)))]
    for heading, group in sections(report.rows).items():
        rows.append(tag("tr", tag("th", _heading(heading), colspan=str(len(_HEAD))), "section"))
        rows += [_line(line) for line in group]
    note = tag("p", "<br>".join(escape(t) for t in footer(report)), "summary")
    return note + _bar(report) + tag("div", tag("table", "".join(rows), "report"), "scroll")


def passes(part: Part) -> str:
    """What each pass did, as a table."""
    rows = tag("tr", tag("th", "pass") + tag("th", "matches", "n") + tag("th", "milliseconds", "n"))
    for one in part.passes:
        columns = tag("td", escape(one.name), "code") + tag("td", str(one.matches), "n")
        rows += tag("tr", columns + tag("td", f"{one.seconds * 1e3:.1f}", "n"))
    return tag("table", rows)


def _heading(text: str) -> str:
    done = not text.startswith("left alone: ")
    return tag("span", "quantized" if done else "left alone", "mark done" if done else "mark left") + " " + escape(
        text.removeprefix("left alone: ")
    )  # fmt: skip


def _line(line: Line) -> str:
    columns = cells(line)
    name = tag("span", escape(re.sub(r" ×\d+$", "", columns[0])), "code")
    if line.count > 1:
        inner = "".join(
            tag("li", escape(row_name(r)) + ("" if r.error is None else f" <i>{r.error:.2%}, {sqnr(r):.1f} dB</i>"), "code")
            for r in line.rows
        )
        name = tag("details", tag("summary", f"{name} <b>×{line.count}</b>") + tag("ul", inner))
    rest = "".join(tag("td", escape(c), "n" if i > 1 else "code") for i, c in enumerate(columns[1:]))
    return tag("tr", tag("td", name) + rest)


def _bar(report: Report) -> str:
    """Bytes before and after as two bars."""
    totals = report.totals
    if not totals.float_bytes:
        return ""
    text = ""
    for what, count in (("before", totals.float_bytes), ("after", totals.bytes)):
        width = f"width:{100 * min(1.0, count / totals.float_bytes):.1f}%"
        text += tag("div", tag("span", what) + tag("i", tag("b", "", style=width)) + tag("span", size(count)), f"bar {what}")
    return tag("div", text, "bars")
