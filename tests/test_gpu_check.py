"""``qcompile gpu-check``: it runs to its end whatever happens to a row, and its two kinds of rows tell the truth."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qcompile.cli import main
from qcompile.gpucheck import device, driver, numerics, page, speed
from qcompile.kernels import dispatch
from qcompile.kernels.cuda import linear as cuda_linear

NO_GPU = device.find() is None
#: Answers each row with what its second word asks for.
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    row = json.loads(line)
    if row[1] == "die":
        print("the device is gone", file=sys.stderr, flush=True)
        os._exit(7)
    if row[1] == "hang":
        time.sleep(60)
    print("a library says something")
    print("\\x1erow " + json.dumps({"state": "ok", "broken": row[1] == "broken", "pid": os.getpid()}), flush=True)
"""


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here")
def test_without_a_gpu_every_row_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    assert main(["gpu-check", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == out.read_text(encoding="utf-8").strip()
    for row in driver.listing():
        why = "no NVIDIA or AMD GPU here" if row[1] == "cuda" else "no Apple GPU here"
        assert f"| {' '.join(row)} | skipped: {why} |" in printed


def test_every_registered_kernel_has_a_row() -> None:
    rows = {row[1:4] for row in driver.listing() if row[0] == "numerics"}
    table = {(k.device, k.name, k.operator) for kind in device.KINDS for k in dispatch.kernels(device=kind)}
    assert rows == table | {("cuda", "triton-codes", "norm_quantize")} and len({row[0] for row in rows}) == 2
    contenders = {row[2] for row in driver.listing("speed") if row[0] == "speed"}
    ours = {"float16", "qint4", "int8 x int8", "float8 x float8"}
    assert ours | {"torchao int4", "gemlite int4", "bitsandbytes nf4", "Marlin int4"} <= contenders
    assert len(driver.listing("speed", quick=True)) < len(driver.listing("speed")) < len(driver.listing())


def test_a_row_costs_no_other_row() -> None:
    rows: list[driver.Row] = [("r", w) for w in ("fine", "die", "good", "broken", "well", "hang", "last")]
    outcomes = driver.attempt(rows, [sys.executable, "-c", WORKER], 100, 3)
    assert [outcomes[row]["state"] for row in rows] == ["ok", "failed", "ok", "ok", "ok", "failed", "ok"]
    assert "ended with 7: the device is gone" in outcomes["r", "die"]["why"]
    assert outcomes["r", "hang"]["why"] == "no answer in 3 s"
    processes = [outcomes[row].get("pid") for row in rows]
    # each failure, and an outcome after which nothing else can run, is followed by a new process
    assert processes[2] == processes[3] and len({p for p in processes if p}) == 4


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here")
def test_the_real_worker_answers() -> None:
    row = ("numerics", "mps", "metal-rows", "linear", numerics.SCHEMES[0])
    outcome = driver.attempt([row], driver.worker_command(), 300, 300)[row]
    assert outcome == {"state": "skipped", "why": "no Apple GPU here", "broken": False}


@pytest.mark.parametrize("seconds", [0.5, 4.0, 40.0, 1000.0])
def test_it_ends_in_time(seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU whose every row takes so long, by a clock that only the rows move: under ten minutes, whatever the rows do."""
    now = [1000.0]
    spent = {"numerics": 0.0, "limit": 0.0, "speed": 0.0}

    class Worker:
        def __init__(self, command: object) -> None:
            now[0] += 8.0  # it imports torch

        def ask(self, row: driver.Row, timeout: float) -> dict[str, object]:
            took = min(seconds, timeout)
            now[0] += took
            spent[row[0]] += took
            if took < seconds:
                return {"state": "failed", "why": "no answer", "broken": True, "late": True}
            return {"state": "ok", "errors": {}, "value": 1e12, "seconds": {}, "bytes": 1}

        def __enter__(self) -> Worker:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(driver, "_Worker", Worker)
    monkeypatch.setattr(driver, "find", lambda: device.Gpu("cuda", "pretended", 1 << 20))
    monkeypatch.setattr(driver.time, "monotonic", lambda: now[0])
    assert driver.main([]) == int(seconds > 90)
    assert now[0] - 1000 < 10 * 60
    assert spent["numerics"] <= 4.5 * 60 + 90 and spent["speed"] > 0
    page_of_it = capsys.readouterr().out
    assert ("out of time" in page_of_it) == (seconds > 1)
    if seconds > 1:  # the first rows of each part are the most telling ones, and were tried
        assert spent["limit"] > 0


def test_out_of_time() -> None:
    rows: list[driver.Row] = [("r", "hang"), ("r", "fine")]
    outcomes = driver.attempt(rows, [sys.executable, "-c", WORKER], 1, 30)
    assert outcomes["r", "hang"]["why"] == "out of time" and outcomes["r", "fine"]["why"] == "out of time"
    assert {outcome["state"] for outcome in outcomes.values()} == {"skipped"}
    assert driver.attempt(rows, ["/no/such/worker"], 0, 1)["r", "fine"]["why"] == "out of time"


@pytest.mark.parametrize("kind", list(device.KINDS))
def test_the_references_pass_the_numerics(kind: str) -> None:
    """The rows themselves, with the operators' references on the CPU in the GPU's place."""
    checked = 0
    few = (*(numerics.SCHEMES[i] for i in (0, 2, 4, 6)), *numerics.ROUNDINGS)
    for name, operator, scheme in numerics.rows(kind):
        if scheme not in few:
            continue
        found = numerics.check(name, operator, scheme, kind, on="cpu")
        assert found["wrong"] == [] and len(found["errors"]) == 3, (name, operator, scheme, found)
        checked += sum(isinstance(error, float) for error in found["errors"].values())
    assert checked >= 6


@pytest.fixture
def broken() -> Iterator[dispatch.Kernel]:
    """A kernel that gives zero."""
    (good,) = (k for k in dispatch.kernels("linear", "mps") if k.name == "metal-rows")

    def zero(*args: object) -> tuple[object, ...]:
        tensors, *rest = good.arguments(*args)  # type: ignore[arg-type]
        return (tensors * 0, *rest)

    bad = dispatch.register(replace(good, name="broken", arguments=zero))
    yield bad
    dispatch.unregister(bad)


def test_a_wrong_kernel_is_found(broken: dispatch.Kernel) -> None:
    found = numerics.check(broken.name, "linear", numerics.SCHEMES[0], "mps", on="cpu")
    assert found["wrong"] == ["float16", "bfloat16", "float32"]
    assert all(isinstance(error, float) and error > 0.01 for error in found["errors"].values())


def test_a_row_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = device.Gpu("cuda", "none", 0)
    monkeypatch.setattr(speed, "measure", lambda *_: 1 / 0)
    assert driver.try_row(("speed", "cuda", "float16", "1B", "8", "8"), gpu)["why"] == "ZeroDivisionError: division by zero"
    monkeypatch.undo()
    outcome = driver.try_row(("speed", "cuda", "Marlin int4", "1B", "8", "8"), gpu)
    assert outcome["state"] == "skipped" and "marlin is not installed" in outcome["why"]


def test_times_and_copies() -> None:
    """On the CPU, whose kernels the same code finds in the table."""
    here = device.Gpu("cpu", "this", cache=1 << 14)
    with_codes = [dispatch.register(replace(k, device="cpu")) for k in dispatch.kernels("linear_quantized", "cuda")]
    for contender in ("float16", "qint4", "qint8", "int8 x int8", "float8 x float8"):
        found = speed.measure(contender, 64, 256, here, (1, 3))
        assert set(found["seconds"]) == {1, 3} and all(0 < s < 10 for s in found["seconds"].values())
    for kernel in with_codes:
        dispatch.unregister(kernel)
    with pytest.raises(LookupError, match="no kernel for linear_quantized"):
        speed.measure("int8 x int8", 64, 256, here)
    assert speed.measure("qint4", 64, 256, here, (1,))["bytes"] < speed.measure("float16", 64, 256, here, (1,))["bytes"] / 3
    with pytest.raises(LookupError, match="NVIDIA"):
        speed.measure("qint4 by Triton", 64, 256, here)
    assert device.bandwidth("cpu", 1 << 16) > 0 and device.peak("cpu", 64) > 0
    before = cuda_linear.takes
    with numerics.without_cuda():
        assert not cuda_linear.takes(torch.zeros(1, 1), torch.zeros(1), 4, "int", 0)
    assert cuda_linear.takes is before


def test_the_page() -> None:
    layer = ("70B", "8192", "8192")
    outcomes: list[tuple[tuple[str, ...], dict[str, object]]] = [
        (("numerics", "cuda", "k", "linear", "s"), {"state": "ok", "errors": {"float16": 1e-4, "float32": "too | wide"}}),
        (("numerics", "cuda", "k", "linear", "t"), {"state": "wrong", "errors": {"float16": float("nan")}}),
        (("numerics", "mps", "m", "linear", "t"), {"state": "skipped", "why": "no Apple GPU here"}),
        (("limit", "cuda", "bandwidth"), {"state": "ok", "value": 1e12}),
        (("limit", "cuda", "peak"), {"state": "failed", "why": "no"}),
        (("speed", "cuda", "float16", *layer), {"state": "ok", "seconds": {"1": 160e-6, "64": 200e-6}, "bytes": 1 << 27}),
        (("speed", "cuda", "qint4", *layer), {"state": "ok", "seconds": {"1": 40e-6, "64": 100e-6}, "bytes": 36 << 20}),
        (("speed", "cuda", "qint8", *layer), {"state": "failed", "why": "RuntimeError: no"}),
    ]
    text = page.render(device.Gpu("cuda", "Some GPU", 1), outcomes)
    assert "| k | linear | s | 1.0e-04 |  | too / wide | ok |" in text and "| nan |  |  | **WRONG** |" in text
    assert "Measured: 1000 GB/s of a copy, peak not measured." in text
    assert "| 70B | 8192 x 8192 | 1 | 160.0 | 40.0 |  | 4.00 | 94% |  |" in text
    assert "at M=1 on layers of 8192 and up: 1 of 1, the least 0.94" in text
    assert "1.5 times float16 at M=64: 1 of 1, the least 2.00" in text and "at any M: 2 of 2, the least 2.00" in text
    assert "| speed cuda qint8 70B 8192 8192 | failed: RuntimeError: no |" in text and "no Apple GPU here" in text
    other = page.render(device.Gpu("mps", "Other", 1), [(("speed", "mps", "float16", *layer), {"state": "ok"})])
    assert "not measured" in other and "Other; torch" in other
