"""The command line, as its users meet it: what is written, what is printed, and how it fails."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pages import Page
from small import Mlp
from torch.export import Dim, export

import qcompile
from qcompile import progress
from qcompile.cli import main
from qcompile.cli_passes import parse
from qcompile.passes.pipeline import PASSES
from qcompile.progress import progress_bar, stage


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A float program in a file."""
    program = export(Mlp().eval(), (torch.randn(4, 64),), dynamic_shapes={"x": {0: Dim("batch", min=2, max=50)}})
    torch.export.save(program, tmp_path / "float.pt2")
    return tmp_path / "float.pt2"


@pytest.mark.parametrize("out", ["q.pt2", "q"])
def test_quantize_writes_what_quantize_makes(model: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = model.parent / out
    assert main(["quantize", str(model), "--weights", "qint4", "--exclude", "down*", "-o", str(target)]) == 0
    program = torch.export.load(target) if target.suffix else qcompile.load(target)
    wanted = qcompile.quantize(torch.export.load(model), "qint4", exclude="down*")
    x = torch.randn(7, 64)
    assert torch.equal(program.module()(x), wanted.module()(x))
    assert qcompile.report(program).rows == qcompile.report(wanted).rows
    printed = capsys.readouterr()
    assert "1 operators quantized, 1 with a weight left alone" in printed.out
    assert printed.err == ""
    assert sorted(p.name for p in model.parent.iterdir()) == sorted(["float.pt2", out])


def test_every_option_of_quantize_arrives(model: Path) -> None:
    target = str(model.parent / "q")
    options = ["--weights", "qint5", "--group-size", "16", "--mode", "symmetric", "--scale-dtype", "bfloat16"]
    more = [
        "--include",
        "up.*",
        "--include",
        "down.*",
        "--optimizer",
        "mse",
        "--min-elements",
        "10",
        "--embeddings",
        "qint8",
    ]
    assert main(["quantize", str(model), *options, *more, "-o", target]) == 0
    assert {r.scheme for r in qcompile.report(target).rows} == {"qint5/group=16/symmetric/bfloat16"}


def test_report_in_three_forms(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, page = str(model.parent / "q"), model.parent / "r.html"
    main(["quantize", str(model), "-o", target])
    capsys.readouterr()
    assert main(["report", target]) == 0
    assert "up.weight" in capsys.readouterr().out
    assert main(["report", target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["quantized"] == 2
    assert main(["report", target, "--html", str(page)]) == 0
    assert "down.weight" in Page(page.read_text()).text


def test_dump_writes_both_graphs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model.parent / "dump"
    assert main(["dump", str(model), str(folder), "--weights", "qint4"]) == 0
    assert {"graph-000-export", "graph-001-lower"} <= set(Page((folder / "index.html").read_text()).ids)
    assert "index.html" in capsys.readouterr().out


def test_bench_compares(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(model), "--runs", "2"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["float", "qint8"]
    apart = float(out.split("outputs: ")[1].split("%")[0])
    assert 0 < apart < 2


def test_passes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PASSES)
    assert "group_size=None" in out


def test_passes_run_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(model.parent / "one.pt2")
    names = ["canonicalize", "select{weights=qint4,exclude=('down*',)}", "quantize-weights{clip=mse}"]
    assert main(["passes", str(model), *names, "-o", out, "--show"]) == 0
    printed = capsys.readouterr().out
    assert "quantize-weights{clip=mse}: 1 matches" in printed
    assert "qcompile.dequantize(weight=up.weight as qint4/group=32/affine/float16)" in printed
    program = torch.export.load(out)
    assert [r.quantized for r in qcompile.report(program).rows] == [True, False]
    x = torch.randn(5, 64)
    assert 0 < float((program.module()(x) - torch.export.load(model).module()(x)).norm().detach()) < 1


def test_a_pass_without_what_it_needs_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", str(model), "select"]) == 0
    assert "run `canonicalize` before it" in capsys.readouterr().out


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_a_text_name_that_parses(name: str) -> None:
    assert str(parse(name)) == name


def test_options_of_passes_parse() -> None:
    text = "select{weights=qint4,group_size=64,mode=symmetric,scale_dtype=torch.bfloat16,exclude=('a', 'b*'),min_elements=1}"
    select = parse(text)
    assert (select.weights, select.group_size, select.exclude) == (qcompile.qint4, 64, ("a", "b*"))
    assert parse(str(select)) == select
    assert parse("pack{exact=True}").exact is True
    assert parse("select{group_size=None}").group_size is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "the passes are"), ("select{bits=4}", "no option 'bits'"), ("select{group_size=x}", "group_size=x"),
        ("select{mode=odd}", "must be one of"), ("select{weights=qint9}", "qint9"), ("pack{exact=maybe}", "exact=maybe"),
        ("select{", "no pass"),
    ],
)  # fmt: skip
def test_passes_that_do_not_parse(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "absent.pt2", "-o", "q.pt2"], "no file 'absent.pt2'"),
        (["quantize", "bad.pt2", "-o", "q.pt2"], "is not what torch.export.save writes"),
        (["quantize", "float.pt2", "-o", "float.pt2"], "the same"),
        (["quantize", "float.pt2", "-o", "q.onnx"], "must end in .pt2"),
        (["quantize", "float.pt2", "--weights", "int9", "-o", "q.pt2"], "unknown quantized dtype 'int9'; allowed: qint2"),
        (["quantize", "float.pt2", "--group-size", "0", "-o", "q.pt2"], "group_size must be at least 1"),
        (["quantize", "float.pt2", "--exclude", "head", "-o", "q.pt2"], "no weight matches 'head'"),
        (["report", "float.pt2"], "carries no report"),
        (["report", "."], "no program in"),
        (["passes", "float.pt2"], "name the passes"),
        (["dump", "float.pt2", "bad.pt2/dump"], "cannot write there"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_input_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(model.parent)
    Path("bad.pt2").write_bytes(b"not a zip file")
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"qcompile {arguments[0]}: error: ")
    assert printed.out == ""
    assert sorted(p.name for p in Path().iterdir()) == ["bad.pt2", "float.pt2"]


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["quantize"], ["bench", "x.pt2", "--runs", "0"]], ids=str)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage: qcompile" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("quantize", "report", "dump", "bench", "demo", "gpu-check", "passes"))
    assert main(["--version"]) == 0
    assert qcompile.__version__ in capsys.readouterr().out


def test_the_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import qcompile.demo

    seen: list[list[str]] = []
    monkeypatch.setattr(qcompile.demo, "main", lambda argv: seen.append(argv) or 1)
    assert main(["demo", "--quick", "--only", "vision"]) == 1
    assert seen == [["--quick", "--only", "vision"]]


def test_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qcompile", "report", "absent.pt2"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr == "qcompile report: error: no file 'absent.pt2'\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that only the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def test_no_progress_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCOMPILE_PROGRESS", raising=False)
    assert progress_bar(io.StringIO()) is None
    assert progress_bar(_Terminal()) is not None
    monkeypatch.setenv("QCOMPILE_PROGRESS", "0")
    assert progress_bar(_Terminal()) is None


def test_progress_gives_every_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCOMPILE_PROGRESS", raising=False)
    bar = progress_bar(_Terminal())
    assert bar is not None
    assert list(bar((i * i for i in range(5)), "squares")) == [0, 1, 4, 9, 16]


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setenv("QCOMPILE_PROGRESS", "1")
    stream = io.StringIO()
    bar = progress_bar(stream)
    assert bar is not None
    for _ in bar(range(20), "packing"):
        clock[0] += 0.6
    lines = stream.getvalue().splitlines()
    assert lines[0] == "packing: 2 of 20, 1 s"
    assert lines[-1] == "packing: 20 of 20, 12 s"
    assert 3 <= len(lines) <= 11


def test_quick_work_is_silent(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setenv("QCOMPILE_PROGRESS", "1")
    stream = io.StringIO()
    bar = progress_bar(stream)
    assert bar is not None
    assert list(bar(range(100), "packing")) == list(range(100))
    assert stream.getvalue() == ""


def test_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCOMPILE_PROGRESS", raising=False)
    quiet, watched = io.StringIO(), _Terminal()
    for stream in (quiet, watched):
        with stage("loading", stream):
            pass
    assert quiet.getvalue() == ""
    assert watched.getvalue().startswith("loading …\r")
    assert watched.getvalue().endswith("\r")
