"""``quantize``, ``compile``, ``aot_compile``, ``aot_load``: exported programs in and out."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Cache, Mlp, Tied, distance, rounded
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from qcompile.report import rows_of


@pytest.fixture(autouse=True)
def _verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_VERIFY", "1")


def export(model: nn.Module, *inputs: Any, strict: bool = False, dynamic_shapes: Any = None) -> ExportedProgram:
    return torch.export.export(model.eval(), inputs, strict=strict, dynamic_shapes=dynamic_shapes)


def quantize(ep: ExportedProgram, weights: Any = "qint8", **options: Any) -> ExportedProgram:
    return qcompile.quantize(ep, weights, **{"min_elements": 0, **options})


def snapshot(ep: ExportedProgram) -> tuple[Any, ...]:
    """What an exported program is made of, to see whether it changed."""
    tensors = {k: (id(v), v._version, v.clone()) for k, v in {**ep.state_dict, **ep.constants}.items()}
    return str(ep.graph), str(ep.graph_signature), tensors


@pytest.mark.parametrize("strict", [False, True])
def test_dynamic_shapes(strict: bool) -> None:
    model = Mlp()
    shapes = {"x": {0: Dim("batch", min=0, max=64), 1: Dim("length", max=128)}}
    qep = quantize(export(model, torch.randn(3, 5, 64), strict=strict, dynamic_shapes=shapes))
    run, fast, reference = qep.module(), qcompile.compile(qep, exact=True), rounded(model)
    for size in ((3, 5), (2, 17), (1, 1), (0, 4)):
        x = torch.randn(*size, 64)
        want = reference(x)
        assert run(x).shape == fast(x).shape == want.shape
        if x.numel():
            assert distance(run(x), want) < 1e-5
            assert distance(fast(x), want) < 1e-5
    with pytest.raises((RuntimeError, AssertionError)):
        run(torch.randn(2, 200, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_dtypes(dtype: torch.dtype, weights: str) -> None:
    model, x = Mlp().to(dtype), torch.randn(3, 64, dtype=dtype)
    qep = quantize(export(model, x), weights)
    want = rounded(model, weights)(x)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert distance(qep.module()(x), want) < tolerance
    assert distance(qcompile.compile(qep, exact=True)(x), want) < tolerance


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_the_graph_writes(persistent: bool) -> None:
    model = Cache(persistent=persistent)
    qep = quantize(export(model, torch.randn(1, 64), torch.tensor([0])))
    reference = rounded(model)
    assert ("seen" in qep.state_dict) == persistent
    run, fast = qep.module(), qcompile.compile(qep, exact=True)
    for i in range(4):
        x, position = torch.randn(1, 64), torch.tensor([i])
        want = reference(x, position)
        assert distance(run(x, position), want) < 1e-5
        assert distance(fast(x, position), want) < 1e-5
    assert distance(run.get_buffer("seen"), reference.seen) < 1e-5


@pytest.mark.parametrize("strict", [False, True])
def test_a_tied_weight_is_held_once(strict: bool, tmp_path: Path) -> None:
    model, words = Tied(), torch.randint(0, 96, (2, 5))
    qep = quantize(export(model, words, strict=strict))
    want = rounded(model)(words)
    assert distance(qep.module()(words), want) < 1e-5
    codes = [name for name, t in qep.state_dict.items() if t.dtype == torch.int8]
    assert len(codes) == 1
    assert codes[0] in ("embed.weight_data", "head.weight_data")
    assert not [name for name, t in qep.state_dict.items() if t.shape == (96, 64) and t.is_floating_point()]
    assert sorted((r.op, r.shared) for r in rows_of(qep.graph)) == [("embedding", False), ("linear", True)]
    loaded = saved(qep, tmp_path)
    assert torch.equal(loaded.module()(words), qep.module()(words))
    assert distance(qcompile.compile(loaded, exact=True)(words), want) < 1e-5


def saved(qep: ExportedProgram, folder: Path) -> ExportedProgram:
    torch.export.save(qep, folder / "m.pt2")
    return torch.export.load(folder / "m.pt2")


def test_the_users_names_stay_and_the_program_given_is_untouched() -> None:
    model, x = Mlp(), torch.randn(3, 64)
    ep = export(model, x)
    before = snapshot(ep)
    qep = quantize(ep, exclude="down")
    assert sorted(qep.state_dict) == ["down.bias", "down.weight", "up.bias", "up.weight_data", "up.weight_scale"]
    assert qep.state_dict["down.weight"] is ep.state_dict["down.weight"]
    after = snapshot(ep)
    assert before[:2] == after[:2]
    assert before[2].keys() == after[2].keys()
    for name, (identity, version, values) in before[2].items():
        assert after[2][name][:2] == (identity, version)
        assert torch.equal(after[2][name][2], values)
    assert distance(ep.module()(x), model(x)) < 1e-6


@pytest.mark.parametrize("weights", ["qint8", "qint4", "qint3", "qfloat8"])
def test_saved_and_loaded_it_gives_the_same_bits(weights: str, tmp_path: Path) -> None:
    model, x = Mlp(), torch.randn(3, 64)
    qep = quantize(export(model, x), weights)
    loaded = saved(qep, tmp_path)
    assert torch.equal(loaded.module()(x), qep.module()(x))
    assert [r.to_dict() for r in rows_of(loaded.graph)] == [r.to_dict() for r in rows_of(qep.graph)]
    assert 0 < distance(qcompile.compile(loaded)(x), model(x)) < 0.3


def test_quantizing_again_takes_what_is_still_float(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Mlp(), torch.randn(3, 64)
    qep = quantize(export(model, x), exclude="down")
    again = quantize(qep, "qint4")
    assert {r.weight: (r.scheme or "").partition("/")[0] for r in rows_of(again.graph)} == {
        "up.weight": "qint8",
        "down.weight": "qint4",
    }
    reference = rounded(model)
    reference.down = rounded(model, "qint4").down
    assert distance(again.module()(x), reference(x)) < 1e-5
    with caplog.at_level(logging.WARNING, "qcompile"):
        third = quantize(again, "qint2")
    assert "nothing to quantize" in caplog.text
    assert torch.equal(third.module()(x), again.module()(x))
    assert list(rows_of(third.graph)) == list(rows_of(again.graph))


def test_compile_takes_a_float_program_as_it_is() -> None:
    model, x = Mlp(), torch.randn(3, 64)
    assert distance(qcompile.compile(export(model, x))(x), model(x)) < 1e-5


def test_keyword_and_nested_arguments_stay() -> None:
    class Nested(Mlp):
        def forward(self, pair: dict[str, Tensor], *, scale: float = 2.0, extra: Tensor) -> dict[str, Any]:
            return {"y": super().forward(pair["x"]) * scale, "rest": (extra, pair["x"])}

    model, x, extra = Nested(), torch.randn(3, 64), torch.randn(2)
    ep = torch.export.export(model.eval(), ({"x": x},), {"scale": 3.0, "extra": extra})
    qep = quantize(ep)
    want = rounded(model)({"x": x}, scale=3.0, extra=extra)
    for run in (qep.module(), qcompile.compile(qep, exact=True)):
        got = run({"x": x}, scale=3.0, extra=extra)
        assert distance(got["y"], want["y"]) < 1e-5
        assert torch.equal(got["rest"][0], extra) and torch.equal(got["rest"][1], x)


def test_autocast_and_no_grad_regions() -> None:
    class Regions(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.up(x)
            with torch.autocast("cpu", torch.bfloat16):
                return self.down(torch.relu(y))

    model, x = Regions(), torch.randn(3, 64)
    qep = quantize(export(model, x))
    assert all(r.quantized for r in rows_of(qep.graph))
    want = rounded(model)(x)
    assert want.dtype == torch.bfloat16
    assert distance(qep.module()(x), want) < 2e-2
    assert distance(qcompile.compile(qep, exact=True)(x), want) < 2e-2


def test_a_retraced_copy_of_a_quantized_program_still_runs() -> None:
    """The operators have fake implementations, so that the program can be exported again and decomposed."""
    model, x = Mlp(), torch.randn(3, 64)
    qep = quantize(export(model, x))
    want = qep.module()(x)
    assert torch.equal(torch.export.export(qep.module(), (x,)).module()(x), want)
    assert torch.equal(copy.deepcopy(qep).module()(x), want)
    assert distance(qep.run_decompositions().module()(x), want) < 1e-6


AOT = """
import sys, torch, qcompile
run = qcompile.aot_load(sys.argv[1])
inputs, want = torch.load(sys.argv[2], weights_only=True)
got = run(*inputs)
error = float((got - want).norm() / want.norm())
assert error < float(sys.argv[3]), error
print(error)
"""


class Picture(nn.Module):
    """A convolution, a lookup and a stack of experts: operators that have no kernel of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.experts = nn.Parameter(torch.randn(4, 8, 16) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).mean(-1)
        return torch.bmm(y.expand(4, -1, -1), self.experts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "no kernel", "cache"])
def test_an_ahead_of_time_package_runs_in_a_fresh_process(kind: str, tmp_path: Path) -> None:
    weights, shapes = ("qfloat8" if kind == "no kernel" else "qint8"), None
    inputs: tuple[Any, ...]
    if kind == "no kernel":
        model, inputs = Picture(), (torch.randn(2, 3, 8, 8),)
    elif kind == "cache":
        model, inputs = Cache(), (torch.randn(1, 64), torch.tensor([2]))
    else:
        model, inputs = Mlp(), (torch.randn(3, 64),)
        shapes = {"x": {0: Dim("rows", max=512)}}
    qep = quantize(export(model, *inputs, dynamic_shapes=shapes), weights)
    want = qep.module()(*inputs)
    path = qcompile.aot_compile(qep, tmp_path / "package.pt2", exact=True)
    assert path == tmp_path / "package.pt2"
    torch.save((inputs, want), tmp_path / "io.pt")
    command = [sys.executable, "-c", AOT, str(path), str(tmp_path / "io.pt"), "1e-5"]
    subprocess.run(command, check=True, timeout=300)


@pytest.mark.slow
def test_peak_memory_of_quantizing_is_float_plus_quantized() -> None:
    script = """
import torch, qcompile
from torch import nn
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
def export(count, width):
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))).eval()
    return torch.export.export(model, (torch.randn(1, width),))
# Once, small: what torch and the kernels load is no part of the question.
qcompile.quantize(export(2, 128), "qint4").module()(torch.randn(1, 128))
start = status("VmRSS")
ep = export(20, 2048)
qep = qcompile.quantize(ep, "qint4")
peak = status("VmHWM") - start
size = lambda p: sum(t.numel() * t.element_size() for t in p.state_dict.values()) / 2**20
print("float", size(ep), "quantized", size(qep), "peak", peak)
assert size(ep) > 300 and size(qep) < 0.17 * size(ep)
assert peak <= 1.15 * (size(ep) + size(qep)), peak
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_errors() -> None:
    model, x = Mlp(), torch.randn(3, 64)
    ep = export(model, x)
    with pytest.raises(TypeError, match="got str"):
        qcompile.quantize("model.pt2")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"no weight matches 'heads\.\*'; the program's weights are: down.weight, up.weight"
    ):
        qcompile.quantize(ep, exclude=["up", "heads.*"])
    with pytest.raises(ValueError, match="no weight matches 'head'"):
        qcompile.quantize(ep, include="head")
    with pytest.raises(ValueError, match="unknown option 'grouping'; known options: weights"):
        qcompile.quantize(ep, grouping=3)
    with pytest.raises(ValueError, match="qint9"):
        qcompile.quantize(ep, "qint9")
    with pytest.raises(ValueError, match="activations must be qint8 or a float8, got qint4"):
        qcompile.quantize(ep, activations="qint4")
    for function in (qcompile.compile, lambda m: qcompile.aot_compile(m, "x.pt2")):
        with pytest.raises(TypeError, match="got Mlp"):
            function(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\.pt2 file, got 'model.so'"):
        qcompile.aot_compile(ep, "model.so")
    with pytest.raises(FileNotFoundError, match=r"no AOTInductor package at 'nowhere\.pt2'"):
        qcompile.aot_load("nowhere.pt2")


def test_a_nan_weight_is_named() -> None:
    model = Mlp()
    with torch.no_grad():
        model.down.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"down\.weight.*NaN or infinity"):
        quantize(export(model, torch.randn(3, 64)))
