"""Training with quantized weights and activations: gradients go straight through, and training works as ever."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from eager import error, rounded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import qcompile


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 97), nn.Tanh(), nn.Linear(97, 33))


def _batch(rows: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 64)
    return x, torch.tanh(x[:, :33] * 2 - x[:, 31:])


@pytest.mark.parametrize("optimizer", ["max", "mse", "hqq", qcompile.MaxOptimizer()], ids=str)
@pytest.mark.parametrize("weights", ["qint2", "qint4", "qint8"])
def test_gradients_go_straight_through(weights: str, optimizer: Any) -> None:
    """The gradient of a weight is that of its rounded value, in float64."""
    original = nn.Sequential(
        nn.Linear(64, 97), nn.Tanh(), nn.Unflatten(-1, (1, 97)), nn.Conv1d(1, 40, 3), nn.ConvTranspose1d(40, 8, 3)
    )
    model = qcompile.quantize(copy.deepcopy(original), weights=weights, optimizer=optimizer)
    reference = rounded(original, model)
    x = torch.randn(5, 64)
    (model(x) ** 2).sum().backward()
    (reference(x.double()) ** 2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and error(parameter.grad, reference.get_parameter(name).grad) < 1e-5, name
    assert len(list(model.parameters())) == 6


@pytest.mark.parametrize("activations", ["qint8", "qfloat8_e4m3fn"])
def test_gradients_through_activations_stop_where_they_saturate(activations: str) -> None:
    model = qcompile.quantize(nn.Linear(64, 33), weights="qint4", activations=activations)
    x = torch.randn(5, 64)
    with qcompile.Calibration(method="minmax"):
        model(x)
    wide = (x * 2).requires_grad_()
    factor = torch.randn(5, 33)
    (model(wide) * factor).sum().backward()
    kind, steps = qcompile.qtype(activations), wide.detach() / model.input_scale
    inside = (steps >= kind.qmin) & (steps <= kind.qmax)
    assert 0 < inside.float().mean() < 1
    torch.testing.assert_close(wide.grad, torch.where(inside, factor @ model.qweight.detach(), 0.0), rtol=1e-4, atol=1e-5)
    rounded_input = model.quantize_input(wide.detach())
    torch.testing.assert_close(model._parameters["weight"].grad, factor.t() @ rounded_input, rtol=1e-4, atol=1e-4)


def _losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, **cast: Any) -> list[float]:
    x, y = _batch(256)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(cast)):
            loss = nn.functional.mse_loss(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("activations", [None, "qint8"])
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.5, momentum=0.9), lambda p: torch.optim.AdamW(p, 1e-2)], ids=["sgd", "adamw"]
)
@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_loss_falls(make: Callable[..., torch.optim.Optimizer], activations: str | None, cast: bool) -> None:
    model = qcompile.quantize(_mlp(), weights="qint4", activations=activations)
    if activations:
        qcompile.calibrate(model, [torch.randn(256, 64)])
    before = [p.clone() for p in model.parameters()]
    losses = _losses(model, make(model.parameters()), 60, **({"cast": True} if cast else {}))
    assert losses[-1] < 0.4 * losses[0]
    assert all(p.dtype == torch.float32 and not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    x, _ = _batch()
    with torch.no_grad():
        assert error(qcompile.freeze(model)(x), model(x)) < 0.02


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = qcompile.quantize(_mlp(), weights="qint4", activations="qint8")
    qcompile.calibrate(model, [torch.randn(64, 64)])
    other = copy.deepcopy(model)
    x = torch.randn(5, 64, requires_grad=True)
    model(x).square().sum().backward()
    gradient, x.grad = x.grad, None
    checkpoint(other, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, gradient)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("frozen", [False, True])
def test_distributed_data_parallel(one_process: None, frozen: bool) -> None:
    model = qcompile.quantize(_mlp(), weights="qint4", activations="qint8")
    qcompile.calibrate(model, [torch.randn(64, 64)])
    if frozen:
        qcompile.freeze(model[0])
    other = copy.deepcopy(model)
    x = torch.randn(5, 64)
    parallel = DistributedDataParallel(model)
    for net in (parallel, other):
        net(x).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    losses = _losses(parallel, torch.optim.AdamW(parallel.parameters(), 1e-2), 40)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", list(qcompile.qtypes))
def test_what_is_trained_is_what_is_frozen_bit_for_bit(weights: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(97, 33), nn.Conv2d(6, 8, 3, groups=2), nn.ConvTranspose1d(6, 8, 3), nn.Embedding(50, 40))
    qcompile.quantize(model.to(dtype), weights=weights)
    trained = [m.qweight.detach() for m in model]
    qcompile.freeze(model)
    for module, value in zip(model, trained, strict=True):
        assert module.qweight.dtype == dtype
        torch.testing.assert_close(module.weight.dequantize(), value, rtol=0, atol=0)


def test_layers_that_run_on_floats_are_the_same_bit_for_bit() -> None:
    """Where no kernel takes over, freezing changes not one output; and in a kernel, its input's rounding alone."""
    model = qcompile.quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), weights="qint4").eval()
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(qcompile.freeze(model)(x), before, rtol=0, atol=0)


def test_training_goes_on_around_frozen_weights() -> None:
    model = qcompile.quantize(_mlp(), weights="qint4")
    qcompile.freeze(model[0])
    codes = model[0].q_weight.dequantize()
    losses = _losses(model, torch.optim.AdamW(model.parameters(), 1e-2), 40)
    assert losses[-1] < 0.6 * losses[0]
    torch.testing.assert_close(model[0].q_weight.dequantize(), codes, rtol=0, atol=0)


def test_compiled_training_has_the_same_gradients() -> None:
    model = qcompile.quantize(_mlp(), weights="qint4", activations="qint8")
    qcompile.calibrate(model, [torch.randn(64, 64)])
    other = copy.deepcopy(model)
    x = torch.randn(5, 64)
    model(x).square().sum().backward()
    torch.compile(other, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert error(b.grad, a.grad) < 1e-4
