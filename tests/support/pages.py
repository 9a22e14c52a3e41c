"""Reading the pages that reports and dumps write."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = ("meta", "br", "link", "img")


class Page(HTMLParser):
    """A page's texts, links and ids; raises where tags do not close in order, or something would be fetched."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.classes: list[str] = []
        self.feed(markup)
        assert self.open == []

    @property
    def text(self) -> str:
        """All text, tags left out."""
        return "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        assert tag not in ("script", "link", "img", "iframe")
        assert "src" not in given
        assert not any(v.startswith(("http", "//")) for v in given.values())
        if "href" in given:
            self.links.append(given["href"])
        if "id" in given:
            self.ids.append(given["id"])
        self.classes += given.get("class", "").split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def dead_links(page: Page, folder: Path) -> list[str]:
    """Links of a page in ``folder`` that lead nowhere: to no id of the page, to no file."""
    return [
        link for link in page.links if (link[1:] not in page.ids if link.startswith("#") else not (folder / link).is_file())
    ]
