"""The report: its numbers are those of the tensors, and it reads well."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import Page
from small import Mlp, Tied
from torch import Tensor, nn

import qcompile
from qcompile.kernels import QTensor, Scheme
from qcompile.passes.decision import Decision
from qcompile.report import Part, Report, sqnr
from qcompile.report_text import WIDTH, lines, ranges, size


class Stack(nn.Module):
    """Layers that repeat, a product of activations in each, and a weight that is too small."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(depth))
        self.gate = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + (x @ x.transpose(-1, -2)).softmax(-1) @ x
        return self.gate(x)


def _quantized(model: nn.Module, *inputs: Tensor, weights: str = "qint4", **options: object) -> torch.export.ExportedProgram:
    return qcompile.quantize(torch.export.export(model.eval(), inputs), weights, **options)


@pytest.fixture(scope="module")
def stack() -> Report:
    torch.manual_seed(0)
    return qcompile.report(_quantized(Stack(), torch.randn(2, 5, 64)))


def test_bytes_and_error_are_those_of_the_tensors() -> None:
    model = Mlp().eval()
    program = _quantized(model, torch.randn(3, 64))
    row = qcompile.report(program).rows[0]
    weight = model.up.weight.detach()
    rounded = QTensor.quantize(weight, Scheme.parse(str(row.scheme)))
    held = sum(t.numel() * t.element_size() for n, t in program.state_dict.items() if n.startswith("up.weight_"))
    assert (row.weight, row.op, row.shape, row.float_bytes) == ("up.weight", "linear", (160, 64), 160 * 64 * 4)
    assert row.bytes == held == rounded.nbytes
    error = float((rounded.dequantize().double() - weight.double()).norm() / weight.double().norm())
    assert row.error == pytest.approx(error, rel=1e-6)
    assert sqnr(row) == pytest.approx(-20 * math.log10(error), rel=1e-6)


def test_totals_count_a_shared_weight_once() -> None:
    report = qcompile.report(_quantized(Tied(), torch.randint(0, 160, (2, 5)), weights="qint8"))
    assert [(r.op, r.shared) for r in report.rows] == [("embedding", False), ("linear", True)]
    totals = report.totals
    assert totals.float_bytes == 160 * 64 * 4
    assert totals.bytes == 160 * 64 + 160 * 4
    assert totals.ratio == totals.bytes / totals.float_bytes
    assert (totals.quantized, totals.left_alone) == (2, 0)


def test_what_is_left_alone_counts_in_full(stack: Report) -> None:
    totals = stack.totals
    assert (totals.quantized, totals.left_alone, totals.activations) == (24, 1, 24)
    assert totals.bytes - totals.quantized_bytes == totals.float_bytes - totals.quantized_float_bytes == 8 * 64 * 4


def test_several_graphs_of_one_model_count_once() -> None:
    rows = (Decision("linear", "n", "a.weight", scheme="qint8/channel=0/symmetric/float32", float_bytes=100, bytes=30),)
    once, twice = Report((Part("prefill", rows),)), Report((Part("prefill", rows), Part("decode", rows)))
    assert twice.totals == once.totals
    assert len(twice.rows) == 1
    assert "2 graphs" in str(twice)
    other = (Decision("linear", "n", "a.weight", reason="excluded by 'a'", float_bytes=100, bytes=100),)
    both = Report((Part("prefill", rows), Part("decode", other)))
    assert len(both.rows) == 2
    assert (both.totals.float_bytes, both.totals.bytes) == (100, 130)


def test_one_weight_held_twice_in_a_graph_counts_twice_after() -> None:
    row = Decision("linear", "n", "w", scheme="qint8/channel=0/symmetric/float32", float_bytes=100, bytes=30)
    totals = Report((Part("export", (row, row)),)).totals
    assert (totals.float_bytes, totals.bytes) == (100, 60)


def test_the_text_groups_layers_and_fits_a_terminal(stack: Report) -> None:
    text = str(stack)
    assert "layers.{0-11}.up.weight ×12" in text
    assert "left alone: both operands are activations" in text
    assert "too small to win" in text
    assert text.count("up.weight") == 1
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "24 operators quantized, 1 with a weight left alone, 24 products of activations" in text


def test_long_names_are_cut_in_the_middle() -> None:
    name = "encoder." + ".".join(f"a_rather_long_module_name_{c}" for c in "abcdef") + ".weight"
    row = Decision("linear", "n", name, shape=(12345, 67890), reason="too small", float_bytes=10**9, bytes=10**9)
    text = str(Report((Part("export", (row,)),)))
    assert max(map(len, text.splitlines())) <= WIDTH
    (line,) = (x for x in text.splitlines() if "linear" in x)
    assert line.lstrip().startswith("encoder.")
    assert "…" in line
    assert ".weight" in line


def test_numbers_in_names_are_collected() -> None:
    def row(name: str, **more: object) -> Decision:
        return Decision("linear", "n", name, reason="r", **more)  # type: ignore[arg-type]

    names = [f"b.{i}.e.{j}.w1" for i in range(2) for j in range(3)]
    assert [x.name for x in lines(map(row, names))] == ["b.{0-1}.e.{0-2}.w1"]
    # A number that is part of a word stays; one that is the same in all is no range; different shapes stay apart.
    assert [x.name for x in lines([row("h.3.w1"), row("h.3.w2")])] == ["h.3.w1", "h.3.w2"]
    assert [
        x.count for x in lines([row("h.0.w", shape=(1, 2)), row("h.1.w", shape=(1, 2)), row("h.2.w", shape=(2, 2))])
    ] == [2, 1]
    assert [x.name for x in lines([row("h.0.w"), row("h.2.w"), row("h.3.w")])] == ["h.{0,2-3}.w"]
    assert [x.name for x in lines([row("experts[0]"), row("experts[1]")])] == ["experts[{0-1}]"]


def test_the_worst_error_stands_for_a_group() -> None:
    rows = [Decision("linear", "n", f"h.{i}.w", scheme="s", error=e) for i, e in enumerate((0.01, 0.05, 0.02))]
    assert "5.00%" in str(Report((Part("export", tuple(rows)),)))
    assert "26.0" in str(Report((Part("export", tuple(rows)),)))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (10240, "10 KiB"), (1023 * 1024, "1.0 MiB"), (3 << 30, "3.0 GiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_ranges() -> None:
    assert ranges([5, 0, 1, 2, 9, 8]) == "0-2,5,8-9"
    assert ranges([7]) == "7"


def test_json_has_every_row(stack: Report) -> None:
    document = json.loads(stack.to_json())
    (graph,) = document["graphs"]
    assert len(graph["rows"]) == len(stack.rows) == 49
    again = [Decision.from_dict({k: v for k, v in row.items() if k != "sqnr_db"}) for row in graph["rows"]]
    assert again == stack.rows
    assert document["totals"]["bytes"] == stack.totals.bytes
    assert document["totals"]["ratio"] == stack.totals.ratio


def test_json_has_no_infinity() -> None:
    row = Decision("linear", "n", "w", scheme="s", error=0.0)
    (found,) = json.loads(Report((Part("x", (row,)),)).to_json())["graphs"][0]["rows"]
    assert found["sqnr_db"] is None
    assert "inf" in str(Report((Part("x", (row,)),)))


def test_the_page_is_whole_and_needs_nothing_else(stack: Report) -> None:
    text = Page(stack.to_html("A <title>")).text
    assert "A <title>" in text
    assert "layers.{0-11}.up.weight" in text
    assert "layers.7.up.weight" in text
    assert "both operands are activations" in text
    assert "<table" in stack._repr_html_()


def test_names_are_escaped() -> None:
    row = Decision("linear", "n", "<script>alert(1)</script>", reason="<b>")
    html = Report((Part("<i>", (row,)),)).to_html()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_compiled_module_has_a_report() -> None:
    model, other = Mlp().eval(), Mlp().eval()
    compiled, second = (torch.compile(m, backend="qcompile") for m in (model, other))
    with pytest.raises(ValueError, match="run it once"):
        qcompile.report(compiled)
    with torch.no_grad():
        compiled(torch.randn(3, 64))
    for subject in (compiled, model):
        assert [r.weight for r in qcompile.report(subject).rows] == ["up.weight", "down.weight"]
    with pytest.raises(ValueError, match="run it once"):
        qcompile.report(second)
    assert {"canonicalize", "quantize-weights", "pack"} <= {p.name for p in qcompile.report(compiled).parts[0].passes}
    assert "up.weight" in str(qcompile.report())


def test_a_compiled_function_has_the_report_of_the_modules_it_reads() -> None:
    model, other = Mlp().eval(), Mlp().eval()

    @torch.compile(backend="qcompile")
    def twice(x: Tensor) -> Tensor:
        return model(model(x))

    with torch.no_grad():
        twice(torch.randn(3, 64))
        torch.compile(other, backend="qcompile")(torch.randn(3, 64))
    report = qcompile.report(twice)
    assert len(report.parts) == 1
    assert {r.weight.rpartition("_")[0] or r.weight for r in report.rows}
    assert sum(not r.shared for r in report.rows) == 2


def test_what_has_no_report_says_so() -> None:
    with pytest.raises(ValueError, match="carries no report"):
        qcompile.report(torch.export.export(Mlp().eval(), (torch.randn(3, 64),)))
    with pytest.raises(TypeError, match="got int"):
        qcompile.report(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        qcompile.report("no/such/folder")


def test_nothing_compiled_yet() -> None:
    """In a process of its own: this one has compiled things."""
    code = "import qcompile\ntry:\n    qcompile.report()\nexcept ValueError as e:\n    print(e)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert "nothing was compiled" in done.stdout


@pytest.mark.parametrize(
    "values",
    [
        {"op": "linear"}, {"op": "linear", "node": "n", "extra": 1}, {"op": "linear", "node": 3}, [],
        {"op": "linear", "node": "n", "shape": "12"}, {"op": "linear", "node": "n", "shape": [1, "2"]},
        {"op": "linear", "node": "n", "bytes": 1.5}, {"op": "linear", "node": "n", "shared": 1},
    ],
    ids=str,
)  # fmt: skip
def test_rows_from_a_file_are_checked(values: object) -> None:
    with pytest.raises(ValueError, match="not a report row"):
        Decision.from_dict(values)  # type: ignore[arg-type]
