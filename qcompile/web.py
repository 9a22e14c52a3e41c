"""Pages that open from disk and need nothing else: no script from elsewhere, no font, no picture."""

from __future__ import annotations

import html
from functools import cache
from importlib.resources import files

__all__ = ["escape", "page", "tag"]


def escape(value: object) -> str:
    """``value`` as text of a page."""
    return html.escape(str(value), quote=True)


def tag(name: str, content: str = "", css: str = "", **attributes: str) -> str:
    """An element; ``content`` is markup already, attributes are escaped."""
    given = {"class": css, **attributes} if css else attributes
    written = "".join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in given.items())
    return f"<{name}{written}>{content}</{name}>"


def page(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


@cache
def _style() -> str:
    return (files("qcompile") / "page.css").read_text("utf-8")
