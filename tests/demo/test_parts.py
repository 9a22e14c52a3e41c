"""Tables, memory figures, workers and the small measures that the demo's figures rest on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from qcompile.demo import driver, encoder, language, memory, vision
from qcompile.demo.fetch import DownloadError
from qcompile.demo.language import LanguageResult
from qcompile.demo.progress import bar
from qcompile.demo.table import megabytes, table
from qcompile.demo.variants import VARIANTS, Variant, by_name
from qcompile.demo.worker import Worker, WorkerError


def test_table_lines_up() -> None:
    lines = table(["name", "x"], [["a", "1.5"], ["longer", "20"]]).splitlines()
    assert lines == ["| name   |   x |", "| ------ | --: |", "| a      | 1.5 |", "| longer |  20 |"]
    with pytest.raises(ValueError, match="1 cells"):
        table(["a", "b"], [["x"]])
    assert (megabytes(1_234_567_890), megabytes(None)) == ("1,235", "–")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can start the peak anew")
def test_peak_sees_memory_that_came_and_went() -> None:
    memory.settle()
    assert memory.reset_peak()
    before = memory.resident().total
    assert memory.peak() < before + 20_000_000
    torch.ones(16_000_000).sum()
    memory.settle()
    assert memory.peak() - before > 50_000_000
    assert memory.resident().total - before < 30_000_000


def test_variants() -> None:
    assert [v.quantized for v in VARIANTS] == [False, False, True, True]
    assert by_name("qint4").options["group_size"] == 32
    with pytest.raises(ValueError, match="'float32 eager'"):
        by_name("qint5")
    function = abs
    assert Variant("x", None).compile(function) is function


WORKER = """
import os, sys
from qcompile.demo.worker import serve
class Target:
    def add(self, a, b):
        print("noise on the standard output")
        os.system("echo noise of a child")
        return a + b
    def fail(self):
        raise KeyError("what went wrong")
    def leave(self):
        os._exit(3)
    def _hidden(self):
        return 1
serve(Target())
"""


def test_worker_answers_reports_errors_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_worker_of_this_test.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Worker("a_worker_of_this_test")
    try:
        assert worker.ask("add", a=2, b=3) == 5
        with pytest.raises(WorkerError, match="what went wrong"):
            worker.ask("fail")
        with pytest.raises(WorkerError, match="not a public method"):
            worker.ask("_hidden")
        assert worker.ask("add", a="x", b="y") == "xy"
        with pytest.raises(WorkerError, match="status 3"):
            worker.ask("leave")
        with pytest.raises(WorkerError, match="ended"):
            worker.ask("add", a=1, b=1)
    finally:
        worker.close()


def test_halves_and_top1() -> None:
    assert encoder.halves("a b c d e") == ("a b", "c d e")
    right = torch.eye(3).repeat_interleave(2, 0)
    assert encoder.top1(right) == 1.0
    wrong = torch.eye(3).repeat(2, 1)  # row 0 finds row 3, not row 1
    assert encoder.top1(wrong) == 0.0
    with pytest.raises(ValueError, match=r"\[2n, d\]"):
        encoder.top1(torch.eye(3))


def test_training_learns() -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) % 10
    images = torch.rand(200, 1, 28, 28) * 0.1
    for row, label in enumerate(labels.tolist()):
        images[row, 0, 2 * label : 2 * label + 3] += 0.8
    model = vision.DigitNet(4)
    with bar(1, "test") as progress:
        vision.train(model, images, labels, progress, epochs=12, batch=20)
    assert not model.training
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9


def test_wrong_amounts_raise() -> None:
    with pytest.raises(ValueError, match="room"):
        language.run(steps=100, room=50)
    with pytest.raises(ValueError, match="does not divide"):
        vision.run(held_out=150, batch=100)


def result(name: str, step: float) -> LanguageResult:
    memory_figures = {"before": 1e6, "after": 2e6, "seconds": 1.0, "parameter_bytes": 1e6}
    prepare = {"peak_first": 3e6, "peak": 4e6, "after": 2e6, "prefill_seconds": 5.0, "decode_seconds": 6.0}
    return LanguageResult(name, memory_figures, prepare, 36.6, 512, [1.0], [step, step, 9.0], "an answer")


def test_language_table_compares_with_compiled_float() -> None:
    text = language.show([result("float32 compiled", 0.04), result("qint4", 0.01)])
    assert "4.00x" in text
    assert "100.0" in text
    assert text.count("an answer") == 2


def test_language_table_relates_memory_to_the_weights() -> None:
    one = result("qint4", 0.01)
    one.held = 250_000
    one.store = {"before": 5e6, "peak": 5.25e6, "after": 4.3e6, "seconds": 1.0, "disk": 260_000}
    text = language.show([one])
    assert "(1.00)" in text  # a peak of 1.25 MB for weights of 1 MB and 0.25 MB
    assert "(1.20)" in text  # 0.3 MB kept for 0.25 MB


def test_language_table_says_when_the_machine_was_busy() -> None:
    quiet, busy = result("qint8", 0.01), result("qint4", 0.01)
    assert "busy" not in language.show([quiet, result("float32 compiled", 0.04)])
    busy.decode = [0.01, 0.05, 0.06]
    assert "qint4 took 5.0 times" in language.show([quiet, busy])


def test_driver_goes_on_when_a_part_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(quick: bool, out: Path) -> tuple[str, object]:
        raise DownloadError("no npm here")

    monkeypatch.setitem(driver.PARTS, "encoder", ("Encoder", broken))
    monkeypatch.setitem(driver.PARTS, "vision", ("Vision", lambda quick, out: (f"quick is {quick}", {"a": 1})))
    arguments = ["--quick", "--only", "encoder", "--only", "vision", "--out", str(tmp_path / "out")]
    assert driver.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "no npm here" in printed
    assert "quick is True" in printed
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["vision"] == {"a": 1}
    assert driver.main(["--only", "vision", "--out", str(tmp_path / "out")]) == 0


def test_the_package_has_one_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qcompile import demo

    monkeypatch.setitem(driver.PARTS, "vision", ("Vision", lambda quick, out: ("fine", {})))
    assert demo.main(["--only", "vision", "--out", str(tmp_path)]) == 0
    with pytest.raises(SystemExit):
        demo.main(["--only", "nothing"])
    assert "qcompile.demo.driver" in sys.modules
