"""What Hugging Face Quanto 0.2.7 gets wrong without a word: here each works, or raises.

What ``requantize`` refuses is in ``test_qmap.py``.
"""

from __future__ import annotations

import copy
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from eager import KERNEL, error, rounded
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qcompile
from qcompile import QModuleMixin


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 97), nn.ReLU(), nn.Linear(97, 33))


def test_the_root_module_may_be_a_layer() -> None:
    layer = nn.Linear(64, 33)
    x, y = torch.randn(5, 64), None
    y = layer(x)
    model = qcompile.quantize(layer, weights="qint4")
    assert model is layer and isinstance(model, QModuleMixin) and 0.02 < error(model(x), y) < 0.2
    qcompile.freeze(model)
    assert set(model.state_dict()) == {"weight._data", "weight._scale", "weight._zero", "bias"}
    assert 0.02 < error(model(x), y) < 0.2


def test_one_module_by_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    original = Twice()
    model = qcompile.quantize(copy.deepcopy(original), weights="qint4")
    assert model.first is model.second and isinstance(model.second, QModuleMixin)
    x = torch.randn(5, 64)
    assert error(model(x), rounded(original, model)(x.double())) < 1e-5
    frozen = qcompile.freeze(model)
    assert error(frozen(x), rounded(original, frozen)(x.double())) < 2 * KERNEL
    fresh = qcompile.requantize(Twice(), frozen.state_dict(), qcompile.quantization_map(frozen))
    assert fresh.first is fresh.second
    torch.testing.assert_close(fresh(x), frozen(x), rtol=0, atol=0)


def test_quantizing_twice_raises_or_takes_what_was_left() -> None:
    model = qcompile.quantize(_mlp(), weights="qint4", include="0")
    kept = str(model[0].q.plans["weight"].scheme)
    qcompile.quantize(model, weights="qint8")
    assert str(model[0].q.plans["weight"].scheme) == kept, "what was quantized stays as it is"
    assert "qint8" in str(model[2].q.plans["weight"].scheme)
    with pytest.raises(ValueError, match="already"):
        qcompile.quantize(model, weights="qint8")
    qcompile.freeze(model)
    with pytest.raises(ValueError, match="already"):
        qcompile.quantize(model, weights="qint8")


@pytest.mark.parametrize("weights", list(qcompile.qtypes))
def test_a_row_of_zeros(weights: str) -> None:
    layer = nn.Linear(64, 33)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[7, :32] = 0
    model = qcompile.quantize(layer, weights=weights)
    x = torch.randn(5, 64)
    before = model(x)
    qcompile.freeze(model)
    after = model(x)
    for y in (before, after):
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y[:, 3], layer.bias[3].expand(5))
    assert (model.weight.dequantize()[3] == 0).all() and (model.weight.dequantize()[7, :32] == 0).all()


def test_momentum_zero_is_the_last_batch_for_inputs_and_outputs() -> None:
    model = qcompile.quantize(nn.Linear(64, 33), activations="qint8")
    batches = [torch.randn(4, 64) * f for f in (10.0, 1.0)]
    with qcompile.Calibration(momentum=0.0, streamline=False):
        y = [model(x) for x in batches][-1]
    torch.testing.assert_close(model.input_scale, batches[-1].abs().max() / 127)
    torch.testing.assert_close(model.output_scale, y.abs().max() / 127)


@pytest.mark.parametrize("streamline", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_calibrated_model_is_the_same_after_reload(streamline: bool, frozen: bool) -> None:
    model = qcompile.quantize(_mlp(), weights="qint4", activations="qint8")
    with qcompile.Calibration(streamline=streamline):
        model(torch.randn(16, 64))
    if frozen:
        qcompile.freeze(model)
    stored = save({k: v.contiguous() for k, v in model.state_dict().items()})
    mapping = json.loads(json.dumps(qcompile.quantization_map(model)))
    fresh = qcompile.requantize(_mlp(), load(stored), mapping)
    x = torch.randn(5, 64) * 3
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    assert [m.q.static_output for m in (fresh[0], fresh[2])] == [m.q.static_output for m in (model[0], model[2])]


class Rotary(nn.Module):
    """A layer and frequencies that are not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(64) / 64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x * self.inv_freq)


def test_buffers_that_are_not_saved_survive_the_meta_device_or_it_raises() -> None:
    model = qcompile.freeze(qcompile.quantize(Rotary(), weights="qint4"))
    state, mapping = model.state_dict(), qcompile.quantization_map(model)
    with torch.device("meta"):
        lost = Rotary()
    with pytest.raises(ValueError, match=r"inv_freq.*qcompile\.meta_parameters"):
        qcompile.requantize(lost, state, mapping, device="cpu")
    with qcompile.meta_parameters():
        fresh = Rotary()
    assert fresh.proj.weight.is_meta and not fresh.inv_freq.is_meta
    fresh = qcompile.requantize(fresh, state, mapping, device="cpu")
    x = torch.randn(5, 64)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("activations", [None, "qint8"])
def test_deepcopy_of_a_frozen_model(activations: str | None) -> None:
    model = qcompile.freeze(qcompile.quantize(_mlp(), weights="qint4", activations=activations))
    x = torch.randn(5, 64)
    expected = model(x)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    assert not {b.data_ptr() for b in model.buffers()} & {b.data_ptr() for b in other.buffers()}
    for buffer in model.buffers():
        buffer.zero_()
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    assert type(other[0]) is type(model[0]) and other[0].q is not model[0].q


def test_subclasses_of_linear_keep_their_own_forward() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
            return factor * nn.functional.linear(x, self.weight) + self.bias

    original = Scaled(64, 33)
    model = qcompile.quantize(copy.deepcopy(original), weights="qint4")
    x = torch.randn(5, 64)
    assert isinstance(model, Scaled)
    assert error(model(x, factor=3.0), rounded(original, model)(x.double(), 3.0)) < 1e-5
    frozen = qcompile.freeze(model)
    assert error(frozen(x, 3.0), rounded(original, model)(x.double(), 3.0)) < KERNEL


def test_frozen_weights_collect_no_gradient() -> None:
    model = qcompile.freeze(qcompile.quantize(_mlp(), weights="qint4"))
    assert {n for n, _ in model.named_parameters()} == {"0.bias", "2.bias"}
    x = torch.randn(5, 64, requires_grad=True)
    model(x).sum().backward()
    assert not model[0].weight.requires_grad and model[0].weight.grad is None
    assert not any(b.requires_grad or b.grad is not None for b in model.buffers())
    assert x.grad is not None and model[0].bias.grad is not None, "all else still does"


@pytest.mark.parametrize("name", ["qint7", "int16", "", "qint1", "quint8", "fp8"])
def test_unknown_dtypes_are_named_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ValueError, match=r"qint2, qint3, qint4, .*qfloat8_e4m3fn"):
        qcompile.quantize(_mlp(), weights=name)
    with pytest.raises(ValueError, match=r"qint8.*qfloat8_e4m3fn"):
        qcompile.quantize(_mlp(), activations=name)
    with pytest.raises(ValueError, match="qint2"):
        qcompile.qtype(name)


def test_activations_that_no_kernel_has_raise_at_once() -> None:
    model = _mlp()
    with pytest.raises(ValueError, match=r"activations can be qint8.*got qint4"):
        qcompile.quantize(model, activations="qint4")
    assert not any(isinstance(m, QModuleMixin) for m in model.modules()), "nothing was changed"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_that_match_nothing_raise(option: str) -> None:
    for pattern in ("nowhere", ["0", "attention.*"], "*.weights"):
        with pytest.raises(ValueError, match=r"(?s)matches.*there are.*0\.weight"):
            qcompile.quantize(_mlp(), **{option: pattern})
    model = qcompile.quantize(_mlp(), **{option: "0"})
    assert [isinstance(m, QModuleMixin) for m in (model[0], model[2])] == [option == "include", option == "exclude"]


@pytest.mark.parametrize("size", [1, 7, 50, 64, 97, 1000])
def test_group_sizes_that_do_not_divide_are_kept(size: int) -> None:
    original = nn.Linear(97, 33)
    model = qcompile.freeze(qcompile.quantize(copy.deepcopy(original), weights="qint4", group_size=size))
    width = min(size, 97)
    scale = model.state_dict()["weight._scale"]
    assert list(scale.shape) == [33, -(-97 // width)]
    value = model.weight.dequantize()
    for start in range(0, 97, width):
        group, codes = original.weight[:, start : start + width], value[:, start : start + width]
        step = (group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)) / 15
        assert ((codes - group).abs() <= step[:, None] * 1.01 + 1e-6).all(), "each group has a range of its own"
    x = torch.randn(5, 97)
    assert error(model(x), rounded(original, model)(x.double())) < KERNEL


@pytest.mark.parametrize("bad", [0, -2, 1.5, "32", True])
def test_group_sizes_that_are_none_raise(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="group_size"):
        qcompile.quantize(_mlp(), weights="qint4", group_size=bad)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activations", [None, "qint8"])
def test_compiles_as_one_graph(frozen: bool, dtype: torch.dtype, activations: str | None) -> None:
    """Activations under fullgraph compile, and int4 in bfloat16 under compile, both fail there."""
    model = qcompile.quantize(_mlp().to(dtype), weights="qint4", activations=activations)
    x = torch.randn(5, 64, dtype=dtype)
    if activations:
        with qcompile.Calibration():
            model(x)
    if frozen:
        qcompile.freeze(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert error(compiled(x), model(x)) < (0.03 if dtype == torch.bfloat16 else 0.02)


def test_first_use_builds_into_the_users_cache() -> None:
    from qcompile.kernels.cpu.build import ensure_loaded

    result = ensure_loaded()
    if result.path is None or result.reason == "part of the installation":
        pytest.skip(f"nothing was built: {result.reason}")
    for key in ("purelib", "platlib"):
        assert Path(sysconfig.get_paths()[key]) not in result.path.resolve().parents
    assert Path(qcompile.__file__).resolve().parent not in result.path.resolve().parents


class Experts(nn.Module):
    """Three experts in one parameter, as mixtures hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 64, 48) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ self.up[i] for i in range(3)])


@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_experts_of_three_axes_are_quantized(weights: str) -> None:
    original = Experts()
    model = qcompile.quantize(copy.deepcopy(original), weights=weights, include="up")
    x = torch.randn(5, 64)
    assert weights in str(model.q.plans["up"].scheme)
    assert error(model(x), rounded(original, model)(x.double())) < 1e-5
    frozen = qcompile.freeze(model)
    assert error(frozen(x), rounded(original, frozen)(x.double())) < KERNEL
    assert sum(b.numel() * b.element_size() for b in frozen.buffers()) < 0.4 * original.up.nbytes
    plain = qcompile.quantize(Experts(), weights=weights)
    assert plain.q.plans, "and without being named"


@pytest.mark.parametrize("weights", ["qint8", "qint4", "qfloat8"])
def test_layers_of_columns_are_quantized(weights: str) -> None:
    original = Conv1D(33, 64)
    model = qcompile.quantize(copy.deepcopy(original), weights=weights)
    x = torch.randn(2, 5, 64)
    assert weights in str(model.q.plans["weight"].scheme)
    assert error(qcompile.freeze(model)(x), rounded(original, model)(x.double())) < KERNEL
