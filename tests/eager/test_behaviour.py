"""A quantized module does what the float one did: hooks, gradients, autocast, modes, users' own classes."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from eager import KERNEL, error, rounded
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import qcompile
from qcompile import QModuleMixin


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 33))


freezing = pytest.mark.parametrize("frozen", [False, True])


def _quantized(model: nn.Module, frozen: bool, **options: Any) -> nn.Module:
    model = qcompile.quantize(model, **{"weights": "qint4", **options})
    return qcompile.freeze(model) if frozen else model


@freezing
def test_hooks_survive(frozen: bool) -> None:
    model, seen = _mlp(), []
    model[0].register_forward_pre_hook(lambda m, args: seen.append("pre"))
    model[0].register_forward_hook(lambda m, args, out: out * 0 + 1)
    model[2].register_forward_hook(lambda m, args, kwargs, out: seen.append("after"), with_kwargs=True)
    model[2].register_full_backward_hook(lambda m, grads, outs: seen.append("backward"))
    model = _quantized(model, frozen, activations="qint8")
    ones = torch.nn.functional.gelu(torch.ones(1, 96))
    y = model(torch.randn(5, 64, requires_grad=True))
    torch.testing.assert_close(y, model[2](ones).expand_as(y), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert seen[:2] == ["pre", "after"] and "backward" in seen


@pytest.mark.parametrize("weights, bound", [("qint4", KERNEL), ("qint8", KERNEL), ("qfloat8", 1e-5)])
@freezing
def test_gradient_of_the_input(frozen: bool, weights: str, bound: float) -> None:
    original = nn.Sequential(nn.Linear(64, 97), nn.Tanh(), nn.Conv1d(7, 8, 3), nn.Tanh(), nn.Linear(95, 33))
    model = _quantized(copy.deepcopy(original), frozen, weights=weights)
    x = torch.randn(5, 7, 64, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    reference = rounded(original, model)
    factor = torch.randn(5, 8, 33)
    (model(x) * factor).sum().backward()
    (reference(wide) * factor.double()).sum().backward()
    assert error(x.grad, wide.grad) < 3 * bound
    for name, parameter in model.named_parameters():  # the straight-through gradient is that of the rounded weights
        assert error(parameter.grad, reference.get_parameter(name).grad) < 3 * bound, name


@pytest.mark.parametrize("activations", ["qint8", "qfloat8"])
def test_gradient_of_the_input_through_calibrated_activations(activations: str) -> None:
    model = qcompile.quantize(nn.Linear(64, 33), weights="qint4", activations=activations)
    x = torch.randn(50, 64)
    with qcompile.Calibration(method="minmax"):
        model(x)
    qcompile.freeze(model)
    wide, factor = (x * 2).requires_grad_(), torch.randn(50, 33)
    y = model(wide)
    (y * factor).sum().backward()
    kind, steps = qcompile.qtype(activations), wide.detach() / model.input_scale
    inside = (steps >= kind.qmin) & (steps <= kind.qmax)
    expected = torch.where(inside, factor.double() @ model.weight.dequantize().double(), 0.0)
    assert 0 < inside.double().mean() < 1 and error(wide.grad, expected) < 1e-5
    with torch.no_grad():
        assert error(model(wide), y) < KERNEL, "the same without gradients"


@freezing
@pytest.mark.parametrize("activations", [None, "qint8"])
def test_autocast(frozen: bool, activations: str | None) -> None:
    model = _quantized(_mlp(), frozen, activations=activations)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and error(y, model(x)) < 0.03


@freezing
@pytest.mark.parametrize("activations", [None, "qint8"])
def test_inference_mode(frozen: bool, activations: str | None) -> None:
    model = nn.Sequential(_mlp(), nn.Unflatten(-1, (3, 11)), nn.Conv1d(3, 40, 3))
    model = _quantized(model, frozen, activations=activations)
    x = torch.randn(5, 64)
    expected = model(x)
    with torch.inference_mode():
        assert error(model(x), expected) < 1e-5
    assert error(model(x), expected) < 1e-5, "and afterwards"


@freezing
def test_first_run_in_inference_mode_then_gradients(frozen: bool) -> None:
    model = _quantized(nn.Sequential(nn.Conv1d(3, 40, 3), nn.Linear(62, 33)), frozen)
    x = torch.randn(5, 3, 64, requires_grad=True)
    with torch.inference_mode():
        expected = model(x)
    model(x).sum().backward()
    assert x.grad is not None and error(model(x), expected) < 1e-5


def test_one_forward_in_another() -> None:
    """Within a module's forward its weights are codes; outside they are the float parameters."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ self.inner.weight

    original = Outer()
    model = qcompile.quantize(copy.deepcopy(original), weights="qint4")
    assert isinstance(model.inner.weight, nn.Parameter) and model.inner.weight is model.inner._parameters["weight"]
    assert error(model.inner.qweight, rounded(original, model).inner.weight) < 1e-6
    torch.testing.assert_close(model.inner.weight, original.inner.weight, rtol=0, atol=0)


class Scale(nn.Module):
    """A user's own layer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(features, features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.t()


class Gate(Scale):
    """Another, by a class of its own."""


def test_register_with_forward() -> None:
    @qcompile.register_qmodule(Scale)
    class QScale(QModuleMixin, Scale):
        table = qcompile.eager.mixin.weight_property("table")  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    original = Scale(64)
    model = _quantized(nn.Sequential(copy.deepcopy(original)), True, include="0.table")
    x = torch.randn(5, 64)
    assert type(model[0]) is QScale and isinstance(model[0], Scale)
    assert error(model(x), 2 * rounded(original, model[0])(x.double())) < KERNEL


def test_register_with_qforward() -> None:
    @qcompile.register_qmodule(Gate)
    class QGate(QModuleMixin, Gate):
        def qforward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(super().qforward(x))

    original = Gate(64)
    model = _quantized(copy.deepcopy(original), True, weights="qint8")
    x = torch.randn(5, 64)
    assert type(model) is QGate
    assert error(model(x), torch.sigmoid(rounded(original, model)(x.double()))) < KERNEL
    again = copy.deepcopy(model)
    assert error(again(x), model(x)) == 0


def test_a_class_that_derives_from_a_quantized_one() -> None:
    class Twice(nn.Linear):
        """Doubles."""

    @qcompile.register_qmodule(Twice)
    class QTwice(qcompile.QLinear, Twice):
        def qforward(self, x: Tensor) -> Tensor:
            return super().qforward(x) * 2

    original = Twice(64, 33)
    x = torch.randn(5, 64)
    for activations in (None, "qint8"):
        model = qcompile.quantize(copy.deepcopy(original), weights="qint4", activations=activations)
        expected = 2 * rounded(original, model)(x.double())
        assert type(model) is QTwice and error(model(x), expected) < KERNEL
        assert error(qcompile.freeze(model)(x), expected) < 2 * KERNEL


def test_register_refuses_what_is_no_quantized_module() -> None:
    with pytest.raises(TypeError, match="class of torch"):
        qcompile.register_qmodule(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="QModuleMixin and Linear"):
        qcompile.register_qmodule(nn.Linear)(nn.Linear)  # type: ignore[type-var]


def test_users_own_modules_without_registration() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 96)
            self.mix = nn.Parameter(torch.randn(96, 96) / 10)
            self.position = nn.Parameter(torch.randn(1, 96))

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return torch.einsum("bi,oi->bo", self.up(x), self.mix) * scale + self.position

    original = Gated()
    model = _quantized(copy.deepcopy(original), True, weights="qint4")
    assert set(dict(model.named_parameters())) == {"up.bias", "position"}
    assert "qint8" in str(model.q_mix.scheme) and "qint4" in str(model.up.q_weight.scheme)
    x = torch.randn(5, 64)
    assert error(model(x, scale=3.0), rounded(original, model)(x.double(), scale=3.0)) < 2 * KERNEL


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
def test_weights_that_are_computed_stay_float_and_work(norm: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(norm(nn.Linear(64, 64)), nn.Linear(64, 64)).eval()
    x = torch.randn(5, 64)
    y = model(x)
    qcompile.freeze(qcompile.quantize(model, weights="qint8"))
    assert isinstance(model[1], QModuleMixin) and error(model(x), y) < 0.03


def test_a_scripted_module_is_left_alone() -> None:
    inner = torch.jit.script(nn.Linear(64, 64))
    model = _quantized(nn.Sequential(inner, nn.Linear(64, 64)), True)
    assert model[0] is inner and isinstance(model[1], QModuleMixin)
    assert model(torch.randn(5, 64)).shape == (5, 64)


def test_max_norm_tables_stay_float(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = qcompile.quantize(nn.Embedding(50, 64, max_norm=1.0))
    assert not isinstance(model, QModuleMixin) and "max_norm" in caplog.text


@freezing
@pytest.mark.parametrize("activations", [None, "qint8", "qfloat8"])
@pytest.mark.parametrize("weights", ["qint4", "qint8", "qfloat8"])
def test_export(weights: str, activations: str | None, frozen: bool) -> None:
    model = qcompile.quantize(_mlp(), weights=weights, activations=activations).eval()
    x = torch.randn(5, 64)
    if activations:
        with qcompile.Calibration():
            model(x)
    if frozen:
        qcompile.freeze(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for rows in (2, 7):
            x = torch.randn(rows, 64)
            assert error(program.module()(x), model(x)) < 0.02


def test_train_and_eval_reach_every_module() -> None:
    model = _quantized(_mlp(), True)
    assert all(m.training for m in model.train().modules())
    assert not any(m.training for m in model.eval().modules())
    assert [n for n, _ in model.named_children()] == ["0", "1", "2"]
