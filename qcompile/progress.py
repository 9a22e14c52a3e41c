"""Progress bars."""

from __future__ import annotations

from typing import Any


def progress_bar() -> Any:
    """None until written."""
    return None
