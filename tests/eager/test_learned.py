"""Learned scales of activations (LSQ)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from eager import error
from torch import Tensor, nn

import qcompile


def _model(streamline: bool = False) -> Any:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 33))
    qcompile.quantize(model, weights="qint4", activations="qint8")
    with qcompile.Calibration(streamline=streamline):
        model(torch.randn(64, 64))
    return model


def test_scales_become_parameters_and_buffers_again() -> None:
    model = _model(streamline=True)
    x, state = torch.randn(5, 64), copy.deepcopy(model.state_dict())
    y = model(x)
    scales = qcompile.learn_scales(model)
    assert [id(s) for s in scales] == [id(model[0].input_scale), id(model[2].input_scale)], "outputs are float"
    assert all(isinstance(s, nn.Parameter) and any(s is p for p in model.parameters()) for s in scales)
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    assert [id(s) for s in qcompile.learn_scales(model)] == [id(s) for s in scales], "again changes nothing"
    model.to(torch.bfloat16).float()
    assert torch.equal(model[0].input_scale, state["0.input_scale"])
    frozen = qcompile.freeze(model)
    assert "input_scale" in frozen[0]._buffers and not frozen[0].input_scale.requires_grad
    assert error(frozen(x), y) < 0.05, "weights were bfloat16 for a moment"


def test_the_gradient_is_that_of_lsq() -> None:
    model = _model()
    x, factor = torch.randn(5, 64) * 1.5, torch.randn(5, 64)
    qcompile.learn_scales(model)
    layer = model[0]
    (layer.quantize_input(x) * factor).sum().backward()
    steps = x.double() / layer.input_scale.detach().double()
    slope = torch.where(steps > 127, 127.0, torch.where(steps < -128, -128.0, steps.round() - steps))
    assert (steps.abs() > 128).any()
    expected = (slope * factor.double()).sum() / math.sqrt(x.numel() * 127)
    torch.testing.assert_close(layer.input_scale.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_bad_scale_is_learned_away() -> None:
    model = _model()
    x = torch.randn(256, 64)
    with torch.no_grad():
        y: Tensor = model(x)
        model[0].input_scale.mul_(0.25)
    (scale, *_) = qcompile.learn_scales(model)
    before = error(model(x), y)
    optimizer = torch.optim.Adam([scale], 2e-4)
    for _ in range(150):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
    assert error(model(x), y) < 0.3 * before and scale.item() > 0


def test_scales_below_zero_are_not_used() -> None:
    model = _model()
    (scale, *_) = qcompile.learn_scales(model)
    with torch.no_grad():
        scale.fill_(-1.0)
    assert torch.isfinite(model(torch.randn(5, 64))).all()
    qcompile.freeze(model)
    assert float(model[0].input_scale) > 0


def test_frozen_modules_keep_their_scales() -> None:
    model = _model()
    qcompile.freeze(model[0])
    scales = qcompile.learn_scales(model)
    assert len(scales) == 2 and "input_scale" in model[0]._buffers
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(5, 64))).all()
    qcompile.freeze(model)
    with pytest.raises(ValueError, match="Calibration"):
        qcompile.learn_scales(model)


def test_nothing_to_learn_raises() -> None:
    with pytest.raises(ValueError, match="Calibration"):
        qcompile.learn_scales(qcompile.quantize(nn.Linear(64, 64), activations="qint8"))


def test_it_compiles() -> None:
    model = _model()
    qcompile.learn_scales(model)
    other = copy.deepcopy(model)
    x = torch.randn(5, 64)
    model(x).square().sum().backward()
    torch.compile(other, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert error(b.grad, a.grad) < 1e-3
