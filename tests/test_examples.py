"""The examples in docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

MODULES = (
    "qcompile.api", "qcompile.cli", "qcompile.cli_passes", "qcompile.eager.freezing",
    "qcompile.eager.meta", "qcompile.eager.qmap", "qcompile.report", "qcompile.serialization",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


def test_the_eager_workflow_of_the_readme() -> None:
    readme = Path(__file__).resolve().parent.parent / "README.md"
    found = doctest.testfile(str(readme), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 15
    assert found.failed == 0
