"""Every test here verifies the program after each pass, and starts with empty counters."""

from __future__ import annotations

import pytest
import torch._dynamo.utils


@pytest.fixture(autouse=True)
def _verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_VERIFY", "1")
    torch._dynamo.utils.counters.clear()
