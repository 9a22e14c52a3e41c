"""The pages of a dump: what each pass changed, side by side, repeated layers folded."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from qcompile.dump_text import Item, Snapshot, changes
from qcompile.report import Report
from qcompile.report_html import table
from qcompile.report_text import ranges, size
from qcompile.web import escape, page, tag

if TYPE_CHECKING:
    from qcompile.dump import Dump, Step

#: Unchanged lines that stay visible around changed ones; longer stretches are folded.
_CONTEXT = 3

#: Bytes of graphs beyond which the common page links to them instead of holding them.
_INLINE = 32 << 20

_START, _END = "<!-- graph -->", "<!-- /graph -->"


@dataclass(frozen=True)
class Row:
    """Two lines beside each other; ``kind`` is ``same``, ``change``, or ``swap`` where one took the other's place."""

    kind: str
    left: Item | None
    right: Item | None


@dataclass(frozen=True)
class Block:
    """The rows of one layer, or of what lies between layers; ``signature`` is equal for layers that differ in names only."""

    key: str
    rows: tuple[Row, ...]
    signature: tuple[object, ...]

    @property
    def changed(self) -> int:
        """How many rows differ."""
        return sum(r.kind != "same" for r in self.rows)

    @property
    def title(self) -> str:
        """The layer's path, or the modules that stand outside of layers."""
        if self.key and not self.key.isdigit():
            return self.key
        if not self.key:
            return "inputs and constants outside of repeated layers"
        paths = dict.fromkeys(i.where for r in self.rows for i in (r.left, r.right) if i is not None and i.where)
        shown = ", ".join(list(paths)[:4]) + (", …" if len(paths) > 4 else "")
        return shown or "outside of repeated layers"


def write_pages(dump: Dump, report: Report) -> None:
    """Write the graph's own page, and the page of all graphs in the dump."""
    from qcompile.dump import write_text

    body = _START + graph(dump, report) + _END
    write_text(dump.folder / "index.html", page(dump.name, tag("main", _intro() + body)))
    root = dump.folder.parent
    write_text(root / "index.html", page("qcompile dump", tag("main", tag("h1", "qcompile dump") + _all(root))))


def graph(dump: Dump, report: Report) -> str:
    """Everything about one graph."""
    name = dump.name
    done = [s for s in dump.steps if s.after is not None]
    parts = [tag("h2", escape(name), id=name)]
    if dump.options:
        parts.append(tag("p", tag("code", escape(dump.options)), "dim"))
    for step in dump.steps:
        if step.error is not None:
            parts.append(tag("p", f"{escape(step.one)} failed: {escape(step.error)}", "error"))
    links = [("passes", "Passes"), ("report", "Report"), ("whole", "Whole graph"), ("each", "Pass by pass")]
    parts.append(tag("nav", "".join(tag("a", text, href=f"#{name}-{key}") for key, text in links)))
    parts += [tag("h3", "Passes", id=f"{name}-passes"), _passes(name, dump.steps)]
    parts += [tag("h3", "Report", id=f"{name}-report"), table(report)]
    if done:
        first, last = done[0].before, done[-1].after
        parts.append(tag("h3", "Whole graph: before the first pass, and after the last", id=f"{name}-whole"))
        parts += [_key(), compare(first, last or first, whole=True)]
    parts.append(tag("h3", "Pass by pass", id=f"{name}-each"))
    parts += [_step(name, number, step) for number, step in enumerate(dump.steps)]
    return "\n".join(parts)


def compare(before: Snapshot, after: Snapshot, whole: bool = False) -> str:
    """Two states side by side.

    Args:
        whole: also show layers in which nothing changed.
    """
    blocks = [b for b in _blocks(before, after) if whole or b.changed]
    if not blocks:
        return tag("p", "The graph stays as it is.", "dim")
    alike: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        alike.setdefault(block.signature, []).append(block)
    head = _pair("head", *(f"{t}, constants {size(s.bytes)}" for t, s in (("before", before), ("after", after))))
    return tag("div", head + "".join(_layers(group, whole) for group in alike.values()), "graph")


def _blocks(before: Snapshot, after: Snapshot) -> list[Block]:
    sides = []
    for snapshot in (before, after):
        held: dict[str, list[Item]] = {}
        for item in snapshot.items:
            held.setdefault(item.block, []).append(item)
        sides.append(held)
    order = dict.fromkeys([*_order(before), *_order(after)])
    paired = {key: list(_rows(sides[0].get(key, []), sides[1].get(key, []))) for key in order}
    took = {
        r.left.name: r.right.name
        for rows in paired.values()
        for r in rows
        if r.kind == "swap" and r.left is not None and r.right is not None and r.left.section == "operators"
    }
    blocks = []
    for key, rows in paired.items():
        settled = tuple(_settled(r, took) for r in rows)
        blocks.append(Block(key, settled, _signature(key, settled, took)))
    return blocks


def _signature(key: str, rows: Iterable[Row], took: Mapping[str, str]) -> tuple[object, ...]:
    """The rows with values numbered as they come; one and what took its place have one number."""
    names: dict[str, str] = {}

    def plain(item: Item | None) -> str:
        if item is None:
            return ""
        text = f"{item.where} {item.text}".replace(key, "§")
        return re.sub(r"%\w+", lambda m: names.setdefault(took.get(m.group(), m.group()), f"%{len(names)}"), text)

    return (re.sub(r"\d+", "#", key), *((r.kind, plain(r.left), plain(r.right)) for r in rows))


def _settled(row: Row, took: Mapping[str, str]) -> Row:
    """``row``, counted as the same where only names changed: its own, or those of what it reads."""
    if row.kind == "same" or row.left is None or row.right is None:
        return row
    renamed = re.sub(r"%\w+", lambda m: took.get(m.group(), m.group()), row.left.text)
    return Row("same", row.left, row.right) if renamed == row.right.text else row


def _order(snapshot: Snapshot) -> list[str]:
    """Blocks as they run: what a pass moved to the front does not count."""
    keys = dict.fromkeys(["", *(i.block for i in snapshot.items)])
    counted = [k for k in keys if not k.isdigit()]
    for stretch in sorted((k for k in keys if k.isdigit()), key=int):
        counted.insert(min(len(counted), int(stretch) + 1 + sum(k.isdigit() for k in counted)), stretch)
    return counted


def _rows(left: Sequence[Item], right: Sequence[Item]) -> Iterable[Row]:
    matcher = difflib.SequenceMatcher(None, [i.key for i in left], [i.key for i in right], autojunk=False)
    for operation, a, b, c, d in matcher.get_opcodes():
        for old, new in zip_longest(left[a:b], right[c:d]):
            if operation == "equal":
                yield Row("same" if old.text == new.text else "change", old, new)
            else:
                yield Row("swap", old, new)


def _layers(group: Sequence[Block], whole: bool) -> str:
    """One layer, and behind it those that differ from it in nothing but names."""
    first, *others = group
    text = f"<b>{escape(first.title)}</b> {_count(first)}"
    if others:
        text += tag("span", f" — and {len(others)} more alike: {escape(_span(others))}", "count")
    inner = _render(first)
    if others and whole:
        inner += tag(
            "details",
            tag("summary", f"the other {len(others)} layers, which differ from {escape(first.title)} in names only")
            + "".join(tag("details", tag("summary", escape(o.title)) + _render(o)) for o in others),
            "same",
        )
    return tag("details", tag("summary", text) + inner, open="") if first.changed else tag(
        "details", tag("summary", text) + inner
    )  # fmt: skip


def _span(blocks: Sequence[Block]) -> str:
    """``model.layers.{1-29}`` for the keys of layers."""
    stems: dict[str, list[int]] = {}
    for block in blocks:
        stem, _, number = block.key.rpartition(".")
        stems.setdefault(stem, []).append(int(number))
    return ", ".join((f"{s}." if s else "") + f"{{{ranges(n)}}}" for s, n in stems.items())


def _count(block: Block) -> str:
    total = f"{len(block.rows)} lines"
    return tag("span", f"{total}, {block.changed} changed" if block.changed else f"{total}, unchanged", "count")


def _render(block: Block) -> str:
    """The rows of a block, long unchanged stretches folded."""
    rows = block.rows
    near = [
        any(r.kind != "same" for r in rows[max(0, i - _CONTEXT) : i + _CONTEXT + 1]) or not block.changed
        for i in range(len(rows))
    ]
    parts: list[str] = []
    start, where = 0, ""
    while start < len(rows):
        end = start
        while end < len(rows) and near[end] == near[start]:
            end += 1
        text, where = _lines(block, rows[start:end], where)
        if not near[start] and end - start > 2:
            text = tag("details", tag("summary", f"… {end - start} unchanged lines") + text, "same")
        parts.append(text)
        start = end
    return "".join(parts)


def _lines(block: Block, rows: Sequence[Row], where: str) -> tuple[str, str]:
    parts = []
    for row in rows:
        item = row.right or row.left
        path = _relative(block, item) if item is not None else ""
        if path != where:
            parts.append(tag("div", escape(path), "where"))
            where = path
        old, new = {"same": ("", ""), "change": ("change", "change"), "swap": ("old", "new")}[row.kind]
        left, right = (("" if i is None else _item(i)) for i in (row.left, row.right))
        parts.append(
            f'<div class="pair">{tag("div", left, old if left else "")}{tag("div", right, new if right else "")}</div>'
        )
    return "".join(parts), where


def _relative(block: Block, item: Item) -> str:
    if item.section != "operators":
        return item.section
    return item.where.removeprefix(block.key).lstrip(".") or item.where or "the model itself"


def _item(item: Item) -> str:
    if item.section != "operators":
        return f"<mark>{escape(item.name)}</mark> <u>{escape(item.type)}</u>"
    args = re.sub(r"(\w+/\S*?/\w+)(?=,|$)", r"<u>\1</u>", escape(item.args))
    if not item.name:
        return f"<b>{escape(item.op)}</b> {args}"
    result = f" <em>→ {escape(item.type)}</em>"
    return f"<mark>{escape(item.name)}</mark> = <b>{escape(item.op)}</b>({args}){result}"


def _pair(css: str, left: str, right: str) -> str:
    return tag("div", tag("div", escape(left)) + tag("div", escape(right)), f"pair {css}")


def _passes(name: str, steps: Sequence[Step]) -> str:
    heads = [("", ""), ("pass", ""), ("what it does", ""), ("matches", "n"), ("ms", "n"), ("lines", "n")]
    rows = [tag("tr", "".join(tag("th", text, css) for text, css in heads))]
    for number, step in enumerate(steps):
        link = tag("a", escape(step.one.text_name()), "code", href=f"#{name}-{number:02}")
        about = escape((inspect.getdoc(type(step.one)) or "").split("\n")[0].rstrip(":"))
        numbers = ["", "", tag("span", "failed", "minus")]
        if step.result is not None and step.after is not None:
            numbers = [str(step.result.matches), f"{step.result.seconds * 1e3:.0f}", _difference(step)]
        cells = [tag("td", f"{number:02}", "dim"), tag("td", link), tag("td", about)]
        rows.append(tag("tr", "".join(cells) + "".join(tag("td", n, "n") for n in numbers)))
    return tag("div", tag("table", "".join(rows)), "scroll")


def _difference(step: Step) -> str:
    gone, new, changed = changes(step.before.items, (step.after or step.before).items)
    parts = [(f"−{gone}", "minus", gone), (f"+{new}", "plus", new), (f"~{changed}", "", changed)]
    return " ".join(tag("span", text, css) for text, css, count in parts if count) or "—"


def _step(name: str, number: int, step: Step) -> str:
    title = f"{number:02} {escape(step.one)}"
    if step.result is not None:
        title += tag("span", f" — {step.result.matches} matches in {step.result.seconds * 1e3:.0f} ms", "dim")
    about = tag("div", escape((inspect.getdoc(type(step.one)) or "").replace("::\n", ":\n")), "rewrite")
    if step.error is not None:
        shown = tag("p", f"failed: {escape(step.error)}", "error")
    else:
        shown = compare(step.before, step.after or step.before)
    base = f"{name}/{number:02}.{step.one.text_name()}"
    files = ", ".join(tag("a", suffix, href=f"../{base}.{suffix}") for suffix in ("before.txt", "after.txt", "diff"))
    return tag(
        "details",
        tag("summary", title) + about + tag("p", f"Files: {files}", "dim") + shown,
        "pass",
        id=f"{name}-{number:02}",
    )


def _key() -> str:
    spans = [("old", "gone"), ("new", "new in its place"), ("change", "kept, but changed")]
    return tag("div", "".join(tag("span", text, css) for css, text in spans), "key")


def _intro() -> str:
    return tag(
        "p",
        "A graph is what the model computes, one operator a line: <code>%name = operator(arguments) → dtype[shape]</code>. "
        "A <code>%name</code> is a value; names with dots are the model's own parameters. Each pass rewrites the graph; "
        "the left side is before it, the right side after it. Layers that are built alike are shown once.",
        "dim",
    )


def _all(root: Path) -> str:
    """The pages of all graphs in one, as long as that stays readable."""
    pages = [(p.parent.name, p.read_text("utf-8")) for p in sorted(root.glob("graph-*/index.html"))]
    inline = sum(len(text) for _, text in pages) <= _INLINE
    links = "".join(tag("a", escape(n), href=f"#{n}" if inline else f"{n}/index.html") for n, _ in pages)
    text = _intro() + tag("nav", links)
    if inline:
        for _, held in pages:
            body = held.partition(_START)[2].partition(_END)[0]
            text += body.replace('href="../graph-', 'href="graph-')
    return text
