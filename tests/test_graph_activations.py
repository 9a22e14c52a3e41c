"""Activations of exported programs: rounded by token, with fixed scales after calibration, by the kernels themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import error, export, ungathered
from torch import Tensor, nn
from torch.export import ExportedProgram

import qcompile
from qcompile.export import lowered
from qcompile.report import rows_of


class Mixed(nn.Module):
    """Siblings, a gate, a residual, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.q, self.k = nn.Linear(64, 160), nn.Linear(64, 160)
        self.gate, self.up, self.down = nn.Linear(160, 144), nn.Linear(160, 144), nn.Linear(144, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        y = self.q(x) * torch.tanh(self.k(x))
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


@pytest.fixture(scope="module")
def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval().requires_grad_(False)


def sample(seed: int, length: int = 7) -> Tensor:
    return torch.randn(2, length, 64, generator=torch.Generator().manual_seed(seed))


def calls(ep: ExportedProgram, name: str) -> list[Any]:
    return [n for n in ep.graph.nodes if n.op == "call_function" and name in str(n.target)]


def said(ep: ExportedProgram) -> dict[str, str | None]:
    return {row.weight: row.activations for row in rows_of(ep.graph)}


def quantized(model: Mixed, activations: str | None = "qint8", **options: Any) -> ExportedProgram:
    return qcompile.quantize(export(model, sample(0)), weights="qint8", activations=activations, **options)


def test_by_token(model: Mixed) -> None:
    ep = quantized(model)
    assert len(calls(ep, "fake_quantize_dynamic")) == 3  # of x, of y, and of the gated product
    assert said(ep) == {
        "conv.weight": None, **dict.fromkeys([f"{n}.weight" for n in ("q", "k", "gate", "up", "down")], "qint8 dynamic")
    }  # fmt: skip
    x = sample(1)
    assert 1e-4 < error(ep.module()(x), model(x)) < 0.02
    with ungathered():
        low = lowered(ep)
    tiled = calls(low, "linear_tiled")
    assert not calls(low, "fake_quantize")
    assert len(tiled) >= 3 and all(n.args[-1] is True for n in tiled)  # per_row
    assert error(low.module()(x), ep.module()(x)) < 5e-3  # the convolution rounds its activations


def test_fixed_after_calibration(model: Mixed, tmp_path: Path) -> None:
    ep = quantized(model)
    with torch.no_grad():
        fixed = qcompile.calibrate(ep, (sample(i) for i in range(10)), batches=4, method="minmax")
    assert len(calls(ep, "fake_quantize_dynamic")) == 3  # what was given stays as it was
    assert not calls(fixed, "fake_quantize_dynamic") and len(calls(fixed, "fake_quantize.default")) == 4
    assert set(said(fixed).values()) == {"qint8 static"}
    largest = max(float(sample(i).abs().max()) for i in range(4))
    scales = {k: float(v) for k, v in fixed.state_dict.items() if k.endswith("input_scale")}
    assert any(abs(v - largest / 127) < 1e-6 for v in scales.values())
    x = sample(1)
    want = model(x)
    assert 1e-4 < error(fixed.module()(x), want) < 0.03
    with ungathered():
        low = lowered(fixed)
    tiled = calls(low, "linear_tiled")
    assert len(tiled) >= 3 and all(n.args[-2] is not None for n in tiled)  # x_scale
    assert error(low.module()(x), fixed.module()(x)) < 5e-3
    assert error(qcompile.compile(fixed)(x), fixed.module()(x)) < 5e-3
    qcompile.save(fixed, tmp_path / "fixed")
    again = qcompile.load(tmp_path / "fixed")
    assert torch.equal(again.module()(x), fixed.module()(x)) and said(again) == said(fixed)
    # and once more, from other samples
    other = qcompile.calibrate(fixed, [10 * x])
    assert error(other.module()(10 * x), model(10 * x)) < 0.03 < error(fixed.module()(10 * x), model(10 * x))


def test_what_came_without_is_named(model: Mixed) -> None:
    ep = quantized(model, None)
    with pytest.raises(ValueError, match="which dtype"):
        qcompile.calibrate(ep, [sample(0)])
    fixed = qcompile.calibrate(ep, [(sample(0),), sample(1)], activations="qint8")
    assert set(said(fixed).values()) == {"qint8 static"}


def test_float8_activations_stay_a_rounding_of_their_own(model: Mixed) -> None:
    ep = quantized(model, "qfloat8")
    low = lowered(ep)
    assert len(calls(low, "fake_quantize_dynamic")) == 3
    x = sample(1)
    assert error(low.module()(x), ep.module()(x)) < 0.01
    assert error(ep.module()(x), quantized(model, None).module()(x)) > 5e-4  # float8 has four bits of mantissa


def test_backend_option(model: Mixed) -> None:
    torch._dynamo.reset()
    x = sample(1)
    want = quantized(model).module()(x)
    compiled = torch.compile(model, backend="qcompile", options={"activations": "qint8", "keep_float": True})
    with torch.no_grad():
        assert error(compiled(x), want) < 5e-3
    rows = {row.weight: row.activations for row in qcompile.report(compiled).rows}
    assert rows["down.weight"] == "qint8 dynamic" and rows["conv.weight"] is None


class Overwritten(nn.Module):
    """Rounds a value that is written to before the product reads what was rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        rounded = torch.ops.qcompile.fake_quantize_dynamic(y, "qint8")
        y.view(-1).add_(5)
        return self.linear(rounded) + y


def test_what_is_written_to_is_rounded_where_it_was() -> None:
    model = Overwritten().eval().requires_grad_(False)
    ep = qcompile.quantize(export(model, sample(0)), min_elements=0)
    low = lowered(ep)
    assert len(calls(low, "fake_quantize_dynamic")) == 1
    x = sample(1)
    assert error(low.module()(x), model(x)) < 0.01


class ReadTwice(nn.Module):
    """Two products of one value, which is written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1
        first = self.first(y)
        y.view(-1).mul_(-3)
        return first, self.second(y)


def test_products_of_a_value_that_changes_are_rounded_one_by_one() -> None:
    model = ReadTwice().eval().requires_grad_(False)
    x = sample(1)
    want = model(x)
    ep = qcompile.quantize(export(model, sample(0)), activations="qint8", min_elements=0)
    fixed = qcompile.calibrate(ep, [3 * x])
    for program in (ep, lowered(ep), fixed, lowered(fixed)):
        got = program.module()(x)
        assert all(error(a, b) < 0.05 for a, b in zip(got, want, strict=True))


class Counting(nn.Module):
    """Writes to a buffer each time it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.linear(x) + self.seen


def test_calibrating_leaves_buffers_alone() -> None:
    model = Counting().eval().requires_grad_(False)
    ep = qcompile.quantize(export(model, sample(0)), activations="qint8", min_elements=0)
    before = {k: v.clone() for k, v in ep.state_dict.items()}
    fixed = qcompile.calibrate(ep, [sample(0), sample(1)])
    for k, v in before.items():
        assert torch.equal(v, ep.state_dict[k])
    assert float(fixed.state_dict["seen"]) == float(before["seen"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ep, model: qcompile.calibrate(ep, []), "no samples"),
        (lambda ep, model: qcompile.calibrate(ep, [sample(0)], method="guess"), "unknown calibration method"),
        (lambda ep, model: qcompile.calibrate(ep, [sample(0)], lambda m, s: m(s)), "forward= is for modules"),
        (lambda ep, model: qcompile.calibrate(ep, [torch.full((2, 7, 64), float("nan"))]), "no sample reached"),
        (lambda ep, model: qcompile.calibrate(export(model, sample(0)), [sample(0)]), "no quantized product"),
        (lambda ep, model: qcompile.calibrate(model, [sample(0)], activations="qint8"), "is for exported programs"),
        (lambda ep, model: quantized(model, "qint4"), "activations must be qint8 or a float8"),
    ],
)
def test_refusals(model: Mixed, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(quantized(model), model)


def test_neither_program_nor_module() -> None:
    with pytest.raises(TypeError, match="takes a torch"):
        qcompile.calibrate(3, [])  # type: ignore[call-overload]
