"""The report."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from qcompile.passes.decision import Decision


def rows_of(graph: fx.Graph) -> Iterator[Decision]:
    """The report rows that an exported graph carries."""
    for node in graph.nodes:
        held = node.meta.get("custom", {}).get("qcompile") if isinstance(node.meta.get("custom"), dict) else None
        if held:
            yield from (Decision.from_dict(d) for d in held["decisions"])
            return
