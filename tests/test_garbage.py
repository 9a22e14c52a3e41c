"""Garbage collection is paused where a graph is compiled, and afterwards as it was."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from qcompile import garbage
from qcompile.garbage import collection_paused


@pytest.fixture(autouse=True)
def _on():
    assert gc.isenabled()
    yield
    gc.enable()


def test_nested_blocks_and_errors():
    with pytest.raises(KeyError), collection_paused():
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_what_was_off_stays_off():
    gc.disable()
    with collection_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_the_last_of_several_threads_turns_it_on():
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with collection_paused():
            inside.set()
            leave.wait(60)

    with collection_paused():
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(60)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_the_backend_compiles_without(monkeypatch):
    from qcompile import compiling

    seen = []
    run = compiling.run
    monkeypatch.setattr(compiling, "run", lambda *a: seen.append(gc.isenabled()) or run(*a))
    model = torch.nn.Linear(32, 48).eval()
    with torch.no_grad():
        torch.compile(model, backend="qcompile")(torch.randn(2, 32))
    assert seen and not any(seen)
    assert gc.isenabled() and garbage._holders == 0
