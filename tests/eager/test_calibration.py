"""``Calibration``: which modules get which scales, and when."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from eager import error
from torch import Tensor, nn

import qcompile
from qcompile import Calibration


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 32))


def _quantized(model: nn.Module | None = None, activations: str = "qint8") -> Any:
    return qcompile.quantize(_mlp() if model is None else model, weights="qint8", activations=activations)


def _static(model: nn.Sequential) -> list[tuple[bool, bool]]:
    return [(m.q.static_input, m.q.static_output) for m in model if hasattr(m, "q")]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_momentum_is_exact(momentum: float) -> None:
    model = _quantized(nn.Linear(64, 32))
    batches = [torch.randn(4, 64) * f for f in (1.0, 3.0, 0.2)]
    with Calibration(momentum=momentum, streamline=False):
        outs = [model(x).detach() for x in batches]
    for seen, scale in ((batches, model.input_scale), (outs, model.output_scale)):
        range_ = float(seen[0].abs().max())
        for x in seen[1:]:
            range_ = momentum * range_ + (1 - momentum) * float(x.abs().max())
        assert float(scale) == pytest.approx(range_ / 127, rel=1e-6)


@pytest.mark.parametrize("activations, largest", [("qint8", 127), ("qfloat8_e4m3fn", 448), ("qfloat8_e5m2", 57344),
                                                  ("qfloat8_e4m3fnuz", 240)])  # fmt: skip
def test_the_largest_value_becomes_the_highest_code(activations: str, largest: float) -> None:
    model = _quantized(nn.Linear(64, 32), activations)
    x = torch.randn(4, 64)
    with Calibration(method="minmax"):
        model(x)
        model(x / 2)
    assert float(model.input_scale) == pytest.approx(float(x.abs().max()) / largest, rel=1e-6)
    assert model.input_scale.dtype == torch.float32 and model.input_scale.shape == ()
    top = torch.zeros(64).index_fill(0, torch.tensor([3]), float(x.abs().max()))
    torch.testing.assert_close(model.quantize_input(top), top)
    torch.testing.assert_close(model.quantize_input(top * 3), top)


@dataclass
class Answer:
    logits: Tensor
    aux: tuple[Tensor, dict[str, Tensor]]


class Both(nn.Linear):
    """A layer that takes its input by name and gives a structure."""

    shape: Callable[[Tensor], Any]

    def forward(self, *, hidden: Tensor, scale: float = 1.0) -> Any:
        return self.shape(super().forward(hidden) * scale)


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, None, 3),
    "list": lambda y: [y, y.argmax(-1)],
    "dict": lambda y: {"y": y, "n": 1},
    "nested": lambda y: ({"y": [y]}, y.argmax(-1)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_named_inputs_and_structures_as_outputs(name: str) -> None:
    layer = Both(64, 32)
    layer.shape = SHAPES[name]
    model = _quantized(layer)
    x = torch.randn(4, 64)
    with Calibration(streamline=False):
        expected = model(hidden=x, scale=2.0)
    assert model.q.static_input and model.q.static_output
    assert float(model.input_scale) == pytest.approx(float(x.abs().max()) / 127, rel=1e-6)
    y = model(hidden=x, scale=2.0)
    assert 0 < error(y, expected) < 0.03
    steps = torch.utils._pytree.tree_leaves(y)[0] / model.output_scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


def test_dataclasses_between_modules() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Answer:
            y = self.a(x)
            return Answer(y, (self.b(y), {"z": x}))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Inner(), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            answer = self.inner(x)
            return self.head(answer.logits) + answer.aux[0]

    model = _quantized(Outer())
    x = torch.randn(4, 64)
    with Calibration():
        expected = model(x)
    assert model.inner.a.q.static_output and not model.inner.b.q.static_output and not model.head.q.static_output
    assert error(model(x), expected) < 0.03


def test_streamline_leaves_float_what_no_quantized_module_reads() -> None:
    model = _quantized()
    with Calibration():
        model(torch.randn(4, 64))
    # Linear (read by the norm, which takes floats), norm (read by a linear), linear (read by relu), linear (read by nobody)
    assert _static(model) == [(True, False), (False, True), (True, False), (True, False)]
    assert torch.equal(model[1].output_scale, model[2].input_scale), "the same numbers have the same scale"
    x = torch.randn(4, 64) * 0.5
    once = model[1](model[0](x))
    torch.testing.assert_close(model[2].quantize_input(once), once, rtol=0, atol=0)


def test_without_streamline_every_output_is_quantized() -> None:
    model = _quantized()
    with Calibration(streamline=False):
        model(torch.randn(4, 64))
    assert _static(model) == [(True, True), (False, True), (True, True), (True, True)]
    assert model(torch.randn(9, 64)).unique().numel() <= 256
    model[4].disable_output_quantization()
    assert model(torch.randn(9, 64)).unique().numel() > 256


@pytest.mark.parametrize("streamline", [False, True])
def test_what_was_decided_is_saved_and_restored(streamline: bool) -> None:
    model = _quantized()
    with Calibration(streamline=streamline):
        model(torch.randn(4, 64))
    for frozen in (False, True):
        model = qcompile.freeze(model) if frozen else model
        mapping = json.loads(json.dumps(qcompile.quantization_map(model)))
        fresh = qcompile.requantize(_mlp(), model.state_dict(), mapping)
        assert _static(fresh) == _static(model)
        x = torch.randn(5, 64)
        torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
        other = copy.deepcopy(model)
        assert _static(other) == _static(model)


def test_calibrating_again_starts_anew() -> None:
    model = _quantized()
    x = torch.randn(4, 64)
    with Calibration(streamline=False):
        model(x * 100)
    with Calibration(method="minmax"):
        model(x)
    assert float(model[0].input_scale) == pytest.approx(float(x.abs().max()) / 127, rel=1e-6)
    assert _static(model)[0] == (True, False), "streamlining is decided again, too"


def test_a_module_that_did_not_run_keeps_what_it_had() -> None:
    model = _quantized()
    with Calibration():
        model(torch.randn(4, 64))
    before = [m.input_scale.clone() for m in (model[0], model[4])]
    with Calibration():
        model[4](torch.randn(2, 96) * 50)
    assert torch.equal(model[0].input_scale, before[0]) and not torch.equal(model[4].input_scale, before[1])


def test_never_calibrated_is_dynamic_and_freezing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = _quantized()
    x = torch.cat([torch.randn(1, 64), torch.randn(1, 64) * 1000])
    alone = torch.cat([model(x[:1]), model(x[1:])])
    torch.testing.assert_close(model(x), alone)  # each token has a scale of its own
    qcompile.freeze(model)
    assert "3 modules were not calibrated" in caplog.text
    assert error(model(x), alone) < 0.02


def test_calibrating_sees_floats_through_rounded_weights() -> None:
    model, plain = _quantized(), qcompile.quantize(_mlp(), weights="qint8")
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.endswith("put_scale")})
    x = torch.randn(4, 64)
    with Calibration():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    assert not torch.equal(model(x), plain(x))


def test_an_error_inside_changes_nothing() -> None:
    model = _quantized()
    with pytest.raises(RuntimeError, match="stop"), Calibration():
        model(torch.randn(4, 64))
        raise RuntimeError("stop")
    assert not any(a or b for a, b in _static(model))
    with Calibration():
        model(torch.randn(4, 64))
    assert model[0].q.static_input


def test_wrong_use_raises() -> None:
    for wrong in ({"momentum": 1.0}, {"momentum": -0.1}, {"method": "max"}, {"percentile": 0}, {"percentile": 101}):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "method" not in wrong else "method"):
            Calibration(**wrong)
    with pytest.raises(ValueError, match="no module with quantized activations ran"), Calibration():
        pass
    with pytest.raises(ValueError, match="no module with quantized activations ran"), Calibration():
        qcompile.quantize(nn.Linear(64, 64))(torch.randn(2, 64))
    with pytest.raises(RuntimeError, match="running already"), Calibration() as c, c:
        pass


def test_debug_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = _quantized()
    with Calibration():
        model(torch.randn(4, 64))
    assert capsys.readouterr().out == ""
    with Calibration(debug=True):
        model(torch.randn(4, 64))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "module" and len(lines) == 5
    assert "in_features=64" in lines[1] and f"{float(model[0].input_scale):.4g}" in lines[1]
    assert "QLayerNorm" in lines[2] and "a quantized module" in lines[2] and "float" in lines[4]


def test_batches_that_say_nothing() -> None:
    model = _quantized(nn.Linear(64, 32))
    with Calibration(streamline=False):
        model(torch.empty(0, 64))
    assert not model.q.static_input, "nothing was seen"
    with Calibration(streamline=False, momentum=0.0):
        model(torch.randn(3, 64))
        model(torch.full((2, 64), float("nan")))
        model(torch.empty(0, 64))
    assert torch.isfinite(model.input_scale) and float(model.input_scale) < 1
    with Calibration(streamline=False):
        model(torch.zeros(3, 64))
    assert float(model.input_scale) == 1.0 and torch.isfinite(model(torch.zeros(3, 64))).all()


class Loader:
    """Samples that can be counted."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples, self.taken = samples, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Any]:
        for sample in self.samples:
            self.taken += 1
            yield sample


def test_calibrate_takes_any_iterable() -> None:
    x = [torch.randn(4, 64) for _ in range(4)]
    kinds: list[tuple[list[Any], Any]] = [
        (x, None), ([(a,) for a in x], None), ([[a] for a in x], None), ([{"input": a} for a in x], None),
        ([(a, torch.tensor(3)) for a in x], lambda model, sample: model(sample[0])),
    ]  # fmt: skip
    scales = []
    for samples, forward in kinds:
        model = _quantized()
        model.train()
        model[0].eval()
        loader = Loader(samples)
        assert qcompile.calibrate(model, loader, forward, method="minmax", batches=3) is model
        assert loader.taken == 3, "no more than asked for is fetched"
        assert model.training and not model[0].training and model[2].training
        scales.append(float(model[0].input_scale))
    assert scales == [pytest.approx(max(float(a.abs().max()) for a in x[:3]) / 127, rel=1e-6)] * len(kinds)
    generator = (a for a in x)
    qcompile.calibrate(_quantized(), generator, batches=2)
    assert torch.equal(next(generator), x[2])


def test_calibrate_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="no samples"):
        qcompile.calibrate(_quantized(), [])
    with pytest.raises(ValueError, match="no module with quantized activations"):
        qcompile.calibrate(_mlp(), [torch.randn(4, 64)])
