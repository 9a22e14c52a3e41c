"""Compiled and eager quantized models called from several threads at once, and in a process forked after use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qcompile


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(50, 256), nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def from_threads(call: Callable[[Tensor], Tensor], inputs: list[Tensor], count: int = 4) -> None:
    """Call with all inputs from several threads at once, and compare with what one thread gave before."""
    with torch.no_grad():
        want, wrong = [call(x) for x in inputs], []

    def work(offset: int) -> None:
        with torch.no_grad():
            for i in range(12):
                at = (i + offset) % len(inputs)
                if not torch.equal(call(inputs[at]), want[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


INPUTS = [torch.randint(50, (1, 1)), torch.randint(50, (1, 1)), torch.randint(50, (4, 33))]


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Net().eval(), backend="qcompile", dynamic=False)
    from_threads(compiled, INPUTS)


def test_an_exported_program() -> None:
    ep = torch.export.export(Net().eval().requires_grad_(False), (INPUTS[0],))
    from_threads(qcompile.compile(qcompile.quantize(ep)), INPUTS[:2])


def test_an_eager_model() -> None:
    model = qcompile.quantize(Net().eval(), weights="qint4")
    qcompile.freeze(model)
    from_threads(model, INPUTS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_after_a_fork() -> None:
    """As with torch itself, a child of fork must ask for one thread: the pool of its parent is gone."""
    script = """
import os, sys, torch, qcompile
from torch import nn
model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
x = torch.randn(1, 512)
eager = qcompile.quantize(nn.Sequential(nn.Linear(512, 512)).eval(), weights="qint4")
qcompile.freeze(eager)
compiled = torch.compile(model, backend="qcompile")
with torch.no_grad():
    torch.set_num_threads(1)
    alone = compiled(x), eager(x)
    torch.set_num_threads(2)
    compiled(x), eager(x), compiled(torch.randn(300, 512))
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        same = torch.equal(compiled(x), alone[0]) and torch.equal(eager(x), alone[1])
        os._exit(0 if same else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert torch.equal(compiled(x), alone[0]), "the parent goes on"
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
