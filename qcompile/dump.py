"""Debug dumps."""

from __future__ import annotations

from typing import Any


def observer(origin: str, options: Any) -> Any:
    """Placeholder until written."""
    return None
