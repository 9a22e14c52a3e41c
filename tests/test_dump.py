"""Dumps: every state of the program as text, every change marked, pages that a browser opens from disk."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pages import Page, dead_links
from small import Mlp, Tied
from torch import Tensor, nn

import qcompile
from qcompile import dump
from qcompile.capture_export import from_exported
from qcompile.dump_html import compare
from qcompile.dump_text import Snapshot, block_of, braces, natural, stem
from qcompile.export import lowered
from qcompile.options import Options
from qcompile.passes.base import Pass
from qcompile.passes.pipeline import run
from qcompile.passes.program import Program


class Layers(nn.Module):
    """An embedding, layers that are alike, a norm and a head."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(160, 64)
        self.layers = nn.ModuleList(Mlp() for _ in range(depth))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 160, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def _program(model: nn.Module, *inputs: Tensor) -> Program:
    return from_exported(torch.export.export(model.eval(), inputs))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(dump.VARIABLE, str(tmp_path / "dump"))
    return tmp_path / "dump"


@pytest.fixture
def dumped(folder: Path) -> Path:
    """A dump of a model with layers, quantized and lowered."""
    exported = torch.export.export(Layers().eval(), (torch.randint(0, 160, (2, 5)),))
    lowered(qcompile.quantize(exported, "qint4"))
    return folder


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dump.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert dump.observer("export", Options()) is None
    qcompile.quantize(torch.export.export(Mlp().eval(), (torch.randn(3, 64),)))
    assert list(tmp_path.iterdir()) == []


def test_every_pass_has_its_files(dumped: Path) -> None:
    graphs = sorted(p.name for p in dumped.iterdir() if p.is_dir())
    assert graphs == ["graph-000-export", "graph-001-lower"]
    for graph in graphs:
        passes = json.loads((dumped / graph / "passes.json").read_text())["passes"]
        assert len(passes) >= 4
        for row in passes:
            base = f"{row['number']:02}.{row['pass']}"
            before, after = ((dumped / graph / f"{base}.{s}.txt").read_text() for s in ("before", "after"))
            changed = row["lines_removed"] + row["lines_added"] + row["lines_changed"]
            assert (before == after) == (changed == 0)
            assert ((dumped / graph / f"{base}.diff").read_text().strip() == "") == (before == after)
            assert row["seconds"] >= 0
        assert json.loads((dumped / graph / "report.json").read_text())["totals"]["quantized"] == 10
        Page((dumped / graph / "report.html").read_text())
    assert not list(dumped.rglob(".*"))


def test_one_pass_starts_where_the_last_one_stopped(dumped: Path) -> None:
    files = sorted((dumped / "graph-000-export").glob("*.txt"))
    after = [p.read_text() for p in files if "after" in p.name]
    before = [p.read_text() for p in files if "before" in p.name]
    assert before[1:] == after[:-1]


def test_the_text_has_the_users_names_and_the_schemes(dumped: Path) -> None:
    graph = dumped / "graph-000-export"
    before = next(graph.glob("00.*.before.txt")).read_text()
    after = max(graph.glob("*.after.txt")).read_text()
    assert "layers.2.up.weight: float32[160, 64], 40 KiB" in before
    assert "linear(%add_1, weight=layers.2.up.weight, bias=layers.2.up.bias) → float32[2, 5, 160]" in before
    assert "weight=layers.2.up.weight as qint4/group=32/affine/float16, bias=layers.2.up.bias" in after
    assert "layers.2.up.weight: data uint8[160, 32], scale float16[160, 2], zero uint8[160, 2]" in after
    assert "torch.ops" not in before + after


def test_a_change_shows_in_the_diff(dumped: Path) -> None:
    text = next((dumped / "graph-000-export").glob("*.quantize-weights.diff")).read_text()
    assert "-    layers.0.up.weight: float32[160, 64], 40 KiB" in text
    assert any(
        line.startswith("+") and "qcompile.dequantize(weight=layers.0.up.weight" in line for line in text.splitlines()
    )


def test_pages_are_whole_and_their_links_lead_somewhere(dumped: Path) -> None:
    pages = [dumped / "index.html", *dumped.glob("graph-*/index.html")]
    assert len(pages) == 3
    for path in pages:
        page = Page(path.read_text())
        assert dead_links(page, path.parent) == []
        assert len(set(page.ids)) == len(page.ids)
        assert "qint4/group=32/affine/float16" in page.text
    assert "graph-000-export" in page.text or "graph-001-lower" in page.text
    whole = Page((dumped / "index.html").read_text())
    assert {"graph-000-export", "graph-001-lower"} <= set(whole.ids)
    assert {"old", "new", "change", "plus", "minus"} <= set(whole.classes)


def test_layers_that_are_alike_are_shown_once(dumped: Path) -> None:
    text = Page((dumped / "graph-000-export" / "index.html").read_text()).text
    assert "layers.0 " in text
    assert "3 more alike: layers.{1-3}" in text


def test_a_layer_that_differs_stands_by_itself() -> None:
    program = _program(Layers(5), torch.randint(0, 160, (2, 5)))
    before = Snapshot.of(program)
    run(Options.parse({"weights": "qint4", "exclude": "layers.2.down"}).quantization(), program)
    text = Page(compare(before, Snapshot.of(program), whole=True)).text
    assert "3 more alike: layers.{1,3-4}" in text
    assert "layers.2 " in text


def test_only_what_changed_is_marked() -> None:
    program = _program(Layers(2), torch.randint(0, 160, (2, 5)))
    before = Snapshot.of(program)
    assert "stays as it is" in compare(before, before)
    run(Options.parse({"include": "layers.1.up.weight"}).quantization(), program)
    page = Page(compare(before, Snapshot.of(program)))
    assert "layers.1 " in page.text
    assert "layers.0" not in page.text
    # One linear for one; its constant, on both sides. What reads the linear only sees another name.
    assert (page.classes.count("old"), page.classes.count("new"), page.classes.count("change")) == (1, 1, 2)


def test_torch_compile_dumps_too(folder: Path) -> None:
    with torch.no_grad():
        torch.compile(Mlp().eval(), backend="qcompile", options={"weights": "qint4"})(torch.randn(3, 64))
    (graph,) = folder.glob("graph-*")
    assert graph.name == "graph-000-compile"
    names = [row["pass"] for row in json.loads((graph / "passes.json").read_text())["passes"]]
    assert names.index("quantize-weights") < names.index("pack")
    packed = next(graph.glob("*-pack.after.txt"), None) or max(graph.glob("*pack*.after.txt"))
    assert "up.weight packed" in packed.read_text()
    assert "weights=qint4" in Page((folder / "index.html").read_text()).text


def test_graphs_are_numbered_on(folder: Path) -> None:
    names = [dump.dump_to(folder, origin).name for origin in ("export", "compile", "export")]
    assert names == ["graph-000-export", "graph-001-compile", "graph-002-export"]


@dataclass(frozen=True)
class Broken(Pass):
    """Fails halfway."""

    def run(self, program: Program) -> int:
        program.call_that_is_not_there()  # type: ignore[attr-defined]
        return 0


def test_a_pass_that_fails_is_in_the_dump(folder: Path) -> None:
    program = _program(Mlp(), torch.randn(3, 64))
    watcher = dump.observer("export", Options())
    with pytest.raises(AttributeError):
        run([*Options().quantization()[:2], Broken()], program, watcher)
    (graph,) = folder.glob("graph-*")
    assert list(graph.glob("*.broken.before.txt"))
    assert not list(graph.glob("*.broken.after.txt"))
    last = json.loads((graph / "passes.json").read_text())["passes"][-1]
    assert last["pass"] == "broken"
    assert "call_that_is_not_there" in last["error"]
    page = Page((folder / "index.html").read_text())
    assert "broken failed: AttributeError" in page.text


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(dump.VARIABLE, str(tmp_path / "file" / "dump"))
    with pytest.raises(ValueError, match=r"QCOMPILE_DUMP=.*cannot write there"):
        qcompile.quantize(torch.export.export(Mlp().eval(), (torch.randn(3, 64),)))


def test_use_folder_puts_the_variable_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dump.VARIABLE, raising=False)
    with dump.use_folder(tmp_path):
        assert os.environ[dump.VARIABLE] == str(tmp_path)
    assert dump.VARIABLE not in os.environ
    monkeypatch.setenv(dump.VARIABLE, "before")
    with pytest.raises(KeyError), dump.use_folder(tmp_path):
        raise KeyError
    assert os.environ[dump.VARIABLE] == "before"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    dump.write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        dump.write_text(file, "new \udc80")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_tied_weights_are_counted_once() -> None:
    program = _program(Tied(), torch.randint(0, 160, (2, 5)))
    assert Snapshot.of(program).bytes == 160 * 64 * 4
    assert any("also" in i.name for i in Snapshot.of(program).items)


def test_names_of_parts_and_stacks() -> None:
    assert stem("h.0.q.weight_data") == stem("h.0.q.weight_scale_2") == stem("h.0.q.weight_packed_1") == "h.0.q.weight"
    assert stem("h.0.q.weight_data+h.0.k.weight_data") == "h.0.{q,k}.weight"
    assert stem("h.0.q.weight_data+h.0.k.weight_packed_0") == "h.0.{q,k}.weight"
    assert stem("some_data_here") == "some_data_here"
    assert braces(["a.w", "b.w"]) == "{a,b}.w"
    assert braces(["a.x", "a.y.z"]) == "a.{x,y.z}"


def test_blocks_and_order() -> None:
    assert block_of("model.layers.3.mlp.up") == "model.layers.3"
    assert block_of("3.weight") == "3"
    assert block_of("model.norm") == block_of("") == block_of("conv1.weight") == ""
    assert sorted(["h.10", "h.9", "h.1"], key=natural) == ["h.1", "h.9", "h.10"]


def test_passes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qcompile"):
        qcompile.quantize(torch.export.export(Mlp().eval(), (torch.randn(3, 64),)))
    assert any("quantize-weights: 2 matches" in r.getMessage() for r in caplog.records)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium; it is installed where pages are looked at")
def test_a_browser_shows_the_dump(dumped: Path, tmp_path: Path) -> None:
    """The browser lays the page out: both sides of a changed line stand beside each other, folded layers are folded."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    probe = (dumped / "index.html").read_text().replace(
        "</body>",
        """<script>
        const pair = document.querySelector('.pair > .old').parentElement.children;
        const [a, b] = [...pair].map(x => x.getBoundingClientRect());
        const folded = document.querySelector('details.same');
        document.title = JSON.stringify({
          beside: a.top === b.top && a.right <= b.left + 1 && a.width > 300,
          coloured: getComputedStyle(pair[0]).backgroundColor !== getComputedStyle(document.body).backgroundColor,
          folded: !folded.open && folded.getBoundingClientRect().height < 60,
          narrow: document.documentElement.scrollWidth <= window.innerWidth,
        });
        </script></body>""",
    )  # fmt: skip
    (tmp_path / "probe.html").write_text(probe)
    url = (tmp_path / "probe.html").as_uri()
    done = subprocess.run(
        [*command, "--window-size=1400,900", "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True
    )
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    found = json.loads(title)
    assert found == {"beside": True, "coloured": True, "folded": True, "narrow": True}
