"""The worked example of docs/extending.md runs, and its kernel is the one that computes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.kernels import Scheme
from qcompile.kernels.dispatch import choose, kernels, unregister

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture
def example() -> Iterator[dict[str, Any]]:
    """The names that the page's code defines."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    yield names
    unregister(names["kernel"])
    del names["library"]


def test_the_page_runs(example: dict[str, Any]) -> None:
    import qcompile

    assert "mine" in str(qcompile.report(example["quantized"]))
    x = torch.randn(3, 128)
    with torch.no_grad():
        got, want = example["fast"](x), example["quantized"].module()(x)
    assert float((got - want).norm() / want.norm()) < 1e-6
    assert kernels("linear", "cpu")[0] is example["kernel"]
    chosen, _ = choose("linear", "cpu", Scheme.parse("qint4/group=32/affine/float16"), (32, 64), torch.float32)
    assert chosen is not None and chosen.name != "mine"


def test_an_unknown_device_takes_the_reference() -> None:
    kernel, why = choose("linear", "xpu", Scheme.parse("qint8/channel=0/symmetric/float32"), (32, 64), torch.float32)
    assert kernel is None and why == "no kernel for linear on xpu"
