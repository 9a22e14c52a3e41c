"""What Inductor asks before its first program is answered ahead, by the same answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from torch._inductor import codecache
from torch._inductor.runtime import triton_compat

from qcompile import ahead

pytestmark = pytest.mark.skipif(not triton_compat.HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Inductor does not know Triton's key yet, nor afterwards what a test made of it."""
    codecache.triton_key.clear()
    yield
    codecache.triton_key.clear()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> str:
    """What this process would work out for itself is another key from now on."""
    key = triton_compat.triton_key()
    monkeypatch.setattr(triton_compat, "triton_key", lambda: "computed here")
    return key


def _asked(*lines: str, status: int = 0) -> subprocess.Popen[str]:
    code = f"print({chr(10).join(lines)!r}, end=''); raise SystemExit({status})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_inductor_is_told_what_it_would_have_found(computed: str):
    ahead._ask()
    assert codecache.triton_key() == computed


def test_another_triton_is_not_believed(computed: str):
    ahead._keep(_asked("/elsewhere/triton/__init__.py", "other"))
    assert codecache.triton_key() == "computed here"


@pytest.mark.parametrize(("lines", "status"), [((), 1), (("HERE",), 0), (("HERE", "key"), 1)])
def test_a_process_that_failed_is_not_believed(computed: str, lines: tuple[str, ...], status: int):
    here = [triton_compat.triton.__file__ if line == "HERE" else line for line in lines]
    ahead._keep(_asked(*here, status=status))
    assert codecache.triton_key() == "computed here"


def test_what_inductor_knows_already_stays(computed: str):
    codecache.triton_key()
    ahead._ask()
    assert codecache.triton_key() == "computed here"


def test_without_an_interpreter_nothing_is_asked(computed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    ahead._ask()
    assert codecache.triton_key() == "computed here"
