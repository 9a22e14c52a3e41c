"""``qcompile gpu-check``: are the GPU kernels right on this machine, and how fast, as a table to paste into an issue.

One command, unattended, under ten minutes. Each row is tried by itself in a second process: a row that raises, hangs or
brings the device down costs that row only. Without a GPU every row says what it was skipped for.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check with these command line arguments; 0, or 1 where a kernel computed something wrong or failed."""
    from qcompile.gpucheck.driver import main as run

    return run(argv)
