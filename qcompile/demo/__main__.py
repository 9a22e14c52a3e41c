"""``python -m qcompile.demo``."""

from __future__ import annotations

import sys

from qcompile.demo import main

if __name__ == "__main__":
    sys.exit(main())
