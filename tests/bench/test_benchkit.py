"""What the benchmarks share: turns, records, goals, the page. No test here looks at how long anything took."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from benchkit import machine, page, peers, timing
from benchkit.goals import GOALS
from benchkit.peak import floor, peak
from benchkit.records import Record, Run, table

from qcompile.kernels.cpu import build

MACHINE = {"processor": "a processor", "torch": "2.13"}


def _run(bench: str, *records: Record) -> Run:
    return Run(bench, f"python bench/{bench}.py", MACHINE, {"onnxruntime": "1.31"}, list(records))


def test_kinds_take_turns() -> None:
    order: list[str] = []
    times = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, turn=0.0, least=4)
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4}
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 4  # once to warm up, then an uncounted and a counted call a turn


def test_turns_are_of_equal_time() -> None:
    times = timing.alternate({"slow": lambda: time.sleep(0.02), "quick": lambda: None}, 0.0, turn=0.01, least=2)
    assert len(times["slow"]) == 2 and len(times["quick"]) > 20


def test_calls_that_warm_up_do_not_count() -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.001)

    counted = timing.alternate({"a": call}, 0.0, turn=0.0, least=1, warm=0.03)["a"]
    assert len(counted) == 1
    assert calls[-1] - calls[1] >= 0.03  # the first is of all kinds, before turns begin


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="give at least one"):
        timing.alternate({}, 1.0)


def test_command_around_runs_once_for_nested_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script, log = tmp_path / "around", tmp_path / "log"
    script.write_text(f'#!/bin/sh\necho begin >> {log}\n"$@"\necho end >> {log}\n')
    script.chmod(0o755)
    monkeypatch.setenv("QCOMPILE_BENCH_AROUND", str(script))
    with timing.undisturbed(), timing.undisturbed():
        assert log.read_text() == "begin\n"
    assert log.read_text() == "begin\nend\n"


def test_command_around_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_BENCH_AROUND", "false")
    with pytest.raises(RuntimeError, match="ended before it ran"), timing.undisturbed():
        raise AssertionError("not reached")


def test_machine_is_described() -> None:
    words = machine.describe()
    assert all(isinstance(value, str) and value for value in words.values())
    assert {"processor", "memory", "torch", "qcompile's kernels"} <= set(words)
    assert machine.cache_bytes() > 1 << 16


@pytest.mark.parametrize(("text", "size"), [("32K\n", 32 << 10), ("1024K", 1 << 20), ("32M", 32 << 20), ("many", 0)])
def test_cache_sizes(text: str, size: int) -> None:
    assert machine._bytes(text) == size


def test_missing_peer_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(peers.PEERS, "no-such-peer", "no_such_package.module")
    monkeypatch.setattr(peers, "_told", set())
    assert not peers.available("no-such-peer") and not peers.available("no-such-peer")
    assert capsys.readouterr().out.count("skipped: no-such-peer is not installed") == 1
    assert "no-such-peer" not in peers.versions()


def test_run_comes_back(tmp_path: Path) -> None:
    run = _run("layers", Record({"shape": "64x64", "M": 1}, "qcompile", 0.5, "ms"))
    run.save(tmp_path / "deep" / "layers.json")
    assert Run.load(tmp_path / "deep" / "layers.json") == run
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["layers.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"records": [{"engine": "x"}]}'])
def test_other_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="measure again"):
        Run.load(tmp_path / "x.json")


def test_table() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def _language(ours: float) -> Run:
    case = {"model": "m", "what": "decode", "prompt": 512}
    return _run("language", Record(case, "qint4", ours, "tokens/s"), Record(case, "Q4_0", 100.0, "tokens/s"))


def test_goals_say_met_and_missed() -> None:
    name = "SmolLM2-135M, 4 bits, decode, against llama.cpp Q4_0"
    lines = {ours: page.goals_table({"language": _language(ours)}) for ours in (130.0, 90.0)}
    assert f"| {name} | 1.25x | 1.30x | met |" in lines[130.0]
    assert f"| {name} | 1.25x | **0.90x** | **missed** |" in lines[90.0]
    assert all(text.count("\n") == 2 for text in lines.values())  # what was not measured is no row


def test_page_says_what_ran_on_another_machine(tmp_path: Path) -> None:
    case = {"batch": "1x128"}
    one = _run("encoder", Record(case, "qcompile qint8", 1.0, "ms"))
    other = replace(_run("vision", Record({"batch": 1}, "qcompile qint8", 1.0, "ms")), machine={"processor": "Z80"})
    page.render({"encoder": one, "vision": replace(other, machine=one.machine)}, {}, [], tmp_path / "same.md")
    page.render({"encoder": one, "vision": other}, {}, [], tmp_path / "other.md")
    assert "another machine" not in (tmp_path / "same.md").read_text()
    assert (tmp_path / "other.md").read_text().count("On another machine: Z80, unknown") == 1


def test_goal_is_of_the_worst_case() -> None:
    goal = next(g for g in GOALS if g.what == "one layer, int4 g128, M=32, against ONNX Runtime")
    records = []
    for shape, ours in (("4096x4096", 1.0), ("11008x4096", 2.0)):
        case = {"shape": shape, "scheme": "int4g128", "M": 32}
        records += [Record(case, "qcompile", ours, "ms"), Record(case, "onnxruntime", 3.0, "ms")]
    assert goal.found({"layers": _run("layers", *records)}) == pytest.approx(1.5)
    assert goal.found({}) is None


def test_page_marks_losses(tmp_path: Path) -> None:
    grid = [
        Record({"N": 64, "K": 64, "M": m, "scheme": "int8"}, engine, value, "ms")
        for m, ours in ((1, 0.5), (16, 2.0))
        for engine, value in (("qcompile", ours), ("float32", 1.0))
    ]
    token = [
        Record({"op": "qcompile::x", "calls": 2.0, "bytes": 4e6}, "qcompile", 3.0, "ms"),
        Record({"op": "one token"}, "qcompile", 4.0, "ms"),
    ]
    loop = Record({"function": "dot<A, 4>", "instructions": 9, "multiplies": 4, "loads": 6}, "qcompile", 2, "spills")
    runs = {
        "language": _language(90.0),
        "grid": _run("grid", *grid),
        "token_time": _run("token_time", *token),
        "inner_loops": _run("inner_loops", loop),
    }
    target = tmp_path / "benchmarks.md"
    page.render(runs, {"language": _language(150.0)}, [tmp_path / "benchmarks" / "a.svg"], target)
    text = target.read_text()
    assert "| m | decode | 512 | 90.0 | 100.0 | **0.90x, slower** |" in text
    assert "| m | decode | 512 | 150.0 | 100.0 | 1.50x |" in text and "## Held to AVX2" in text
    assert "| int8 | 16 | 0.50x | 0.50x | **64x64 0.50x** |" in text and "| int8 | 1 | 2.00x | 2.00x | none |" in text
    assert "| qcompile::x | 2 | 3.000 | 75% | 4.00 |" in text
    assert "| `dot<A, 4>` | 1 | 4 | 44% | 1.50 | **2** |" in text
    assert "![a](benchmarks/a.svg)" in text and "a processor" in text and "python bench/language.py" in text


def test_floor() -> None:
    assert floor(packed=100, bandwidth=50.0, products=10, most=20.0) == 2.0  # memory takes longer
    assert floor(packed=100, bandwidth=50.0, products=60, most=20.0) == 3.0  # arithmetic does
    assert floor(packed=100, bandwidth=50.0, products=60, most=0.0) == 2.0  # not known


def test_peak() -> None:
    assert peak("neon", 4, 1) == 0.0
    if build.ensure_loaded().loaded and build.isa() in ("avx2", "avxvnni", "avx512vnni"):
        assert 1e9 < peak(build.isa(), 8, 1, seconds=0.001) < 1e13
