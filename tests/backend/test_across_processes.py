"""Inductor's caches on disk: a second process takes what the first one compiled, and never what another version did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from qcompile import inductor

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
torch.manual_seed(0)
class Deep(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(96, 96) for _ in range(8))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh() * x
        return x
model = Deep().eval()
x = torch.randn(3, 96)
with torch.no_grad():
    want = model(x)
    got = torch.compile(model, backend="qcompile", options={"weights": sys.argv[1]})(x)
from qcompile.inductor import CacheStamp
print(json.dumps({
    "stamp": CacheStamp().uuid().hex(),
    "error": float((got - want).norm() / want.norm()),
    "sum": float(got.double().sum()),
    "hits": counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"] + counters["inductor"]["fxgraph_cache_miss"],
    "bypassed": counters["aot_autograd"]["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"],
}))
"""


def run(folder: Path, weights: str) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, weights], env=environment, check=True, timeout=300, capture_output=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_hits_the_cache(tmp_path: Path) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        first, second = run(folder, "qint8"), run(folder, "qint8")
        if first["stamp"] == second["stamp"]:
            break  # else somebody edited qcompile in between
    assert first["stamp"] == second["stamp"]
    assert first["hits"] == 0 and first["misses"] > 0
    assert second["hits"] > 0 and second["misses"] == 0
    assert first["bypassed"] == second["bypassed"] == 0
    assert second["sum"] == first["sum"]
    assert 0 < second["error"] < 0.03
    other = run(folder, "qint4")
    assert other["misses"] > 0 and other["sum"] != first["sum"] and 0 < other["error"] < 0.3


def test_the_stamp_follows_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.py", "b.cpp", "c.h", "readme.txt"):
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(inductor, "_folders", lambda: (tmp_path,))

    def stamp() -> Any:
        inductor._source_digest.cache_clear()
        return inductor.CacheStamp().uuid()

    try:
        seen = {stamp()}
        assert stamp() in seen
        for name in ("a.py", "b.cpp", "c.h"):
            (tmp_path / name).write_text("two")
            seen.add(stamp())
        (tmp_path / "d.py").write_text("one")
        seen.add(stamp())
        (tmp_path / "d.py").rename(tmp_path / "e.py")
        seen.add(stamp())
        assert len(seen) == 6
        (tmp_path / "readme.txt").write_text("two")
        assert stamp() in seen
    finally:
        monkeypatch.undo()
        inductor._source_digest.cache_clear()


def test_the_stamp_covers_the_real_sources() -> None:
    names = {p.name for folder in inductor._folders() for p in inductor._sources(folder)}
    assert {"backend.py", "inductor.py", "canonicalize.py", "linear.py", "tiled.py", "ops.cpp"} <= names


def test_a_users_own_pass_still_runs_and_counts() -> None:
    class Count(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, graph: fx.Graph) -> None:
            self.calls += 1

        def uuid(self) -> Any:
            return "count"

    theirs = Count()
    model = torch.nn.Linear(64, 160).eval()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=theirs, force_disable_caches=True), torch.no_grad():
        assert theirs in inductor.cache_stamp()["post_grad_custom_pre_pass"]
        torch.compile(model, backend="qcompile")(torch.randn(2, 64))
    assert theirs.calls == 1
