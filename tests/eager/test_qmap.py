"""``quantization_map`` and ``requantize``: what they hold, and what they refuse."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qcompile


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 97), nn.ReLU(), nn.Linear(97, 33))


def _without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


WRONG: dict[str, Any] = {
    "missing codes": lambda s: _without(s, "0.weight._data"),
    "missing scale": lambda s: _without(s, "2.weight._scale"),
    "missing zero": lambda s: _without(s, "2.weight._zero"),
    "missing bias": lambda s: _without(s, "0.bias"),
    "missing input scale": lambda s: _without(s, "0.input_scale"),
    "missing weight": lambda s: {k: v for k, v in s.items() if not k.startswith("0.weight")},
    "extra": lambda s: {**s, "0.weight._extra": torch.zeros(1)},
    "extra module": lambda s: {**s, "9.weight": torch.zeros(1)},
    "shape of codes": lambda s: {**s, "0.weight._data": s["0.weight._data"][:-1]},
    "shape of scale": lambda s: {**s, "0.weight._scale": s["0.weight._scale"][:, :-1]},
    "shape of bias": lambda s: {**s, "0.bias": s["0.bias"][:-1]},
    "dtype of codes": lambda s: {**s, "0.weight._data": s["0.weight._data"].to(torch.int32)},
    "dtype of scale": lambda s: {**s, "0.weight._scale": s["0.weight._scale"].to(torch.float64)},
    "dtype of zero": lambda s: {**s, "0.weight._zero": s["0.weight._zero"].to(torch.float32)},
    "dtype of bias": lambda s: {**s, "0.bias": s["0.bias"].long()},
    "input scale of 0": lambda s: {**s, "0.input_scale": torch.zeros(())},
    "input scale NaN": lambda s: {**s, "0.input_scale": torch.tensor(float("nan"))},
    "shape of input scale": lambda s: {**s, "0.input_scale": torch.ones(3)},
    "no tensor": lambda s: {**s, "0.bias": [0.0] * 97},
}


@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
@pytest.mark.parametrize("wrong", WRONG)
def test_requantize_refuses_what_does_not_fit(wrong: str, meta: bool) -> None:
    model = qcompile.freeze(qcompile.quantize(_mlp(), weights="qint4", activations="qint8"))
    state, mapping = dict(model.state_dict()), qcompile.quantization_map(model)
    with torch.device("meta" if meta else "cpu"):
        fresh, wanted = _mlp(), _mlp()
    qcompile.requantize(wanted, state, mapping)  # as it is, it fits
    with pytest.raises(ValueError, match=r"0\.|2\.|9\."):
        qcompile.requantize(fresh, WRONG[wrong](state), mapping)


def _changed(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    def apply(mapping: Any) -> Any:
        other = copy.deepcopy(mapping)
        change(other)
        return other

    return apply


def _weight(mapping: Any) -> Any:
    return mapping["modules"]["0"]["weights"]["weight"]


MAPS: dict[str, Callable[[Any], Any]] = {
    "no map": lambda m: None,
    "a list": lambda m: [m],
    "empty": lambda m: {},
    "no version": lambda m: {"modules": m["modules"]},
    "a later version": lambda m: {**m, "version": 2},
    "a version as text": lambda m: {**m, "version": "1"},
    "no modules": lambda m: {"version": 1},
    "a list of modules": lambda m: {**m, "modules": list(m["modules"])},
    "an unknown module": _changed(lambda m: m["modules"].update({"9": m["modules"]["0"]})),
    "a module without weights": _changed(lambda m: m["modules"].update({"1": m["modules"]["0"]})),
    "a module left out": _changed(lambda m: m["modules"].pop("0")),
    "a key left out": _changed(lambda m: m["modules"]["0"].pop("static_input")),
    "a key too many": _changed(lambda m: m["modules"]["0"].update(extra=1)),
    "no entry": _changed(lambda m: m["modules"].update({"0": None})),
    "static as text": _changed(lambda m: m["modules"]["0"].update(static_input="yes")),
    "activations of 4 bits": _changed(lambda m: m["modules"]["0"].update(activations="qint4")),
    "activations by number": _changed(lambda m: m["modules"]["0"].update(activations=8)),
    "activations unknown": _changed(lambda m: m["modules"]["0"].update(activations="qint99")),
    "an unknown weight": _changed(lambda m: m["modules"]["0"]["weights"].update(kernel=_weight(m))),
    "the bias": _changed(lambda m: m["modules"]["0"]["weights"].update(bias=_weight(m))),
    "no scheme": _changed(lambda m: _weight(m).pop("scheme")),
    "a scheme that is none": _changed(lambda m: _weight(m).update(scheme="qint4")),
    "a scheme with no group": _changed(lambda m: _weight(m).update(scheme="qint4/group=0/affine/float16")),
    "a scheme of other codes": _changed(lambda m: _weight(m).update(scheme="qint8/group=32/symmetric/float16")),
    "a scheme of other groups": _changed(lambda m: _weight(m).update(scheme="qint4/group=16/affine/float16")),
    "a scheme for another axis": _changed(lambda m: _weight(m).update(scheme="qint8/channel=5/symmetric/float32")),
    "another arrangement": _changed(lambda m: _weight(m).update(arrangement="columns")),
    "an arrangement that is none": _changed(lambda m: _weight(m).update(arrangement="diagonal")),
    "groups": _changed(lambda m: _weight(m).update(groups=2)),
    "groups as text": _changed(lambda m: _weight(m).update(groups="1")),
}


@pytest.mark.parametrize("wrong", MAPS)
def test_requantize_refuses_maps_that_do_not_fit(wrong: str) -> None:
    model = qcompile.freeze(qcompile.quantize(_mlp(), weights="qint4", activations="qint8"))
    mapping = qcompile.quantization_map(model)
    with pytest.raises((ValueError, TypeError)) as caught:
        qcompile.requantize(_mlp(), model.state_dict(), MAPS[wrong](mapping))
    assert type(caught.value) in (ValueError, TypeError) and len(str(caught.value)) > 20


def test_requantize_refuses_a_quantized_model_and_another_architecture() -> None:
    model = qcompile.freeze(qcompile.quantize(_mlp(), weights="qint4"))
    state, mapping = model.state_dict(), qcompile.quantization_map(model)
    with pytest.raises(ValueError, match="already"):
        qcompile.requantize(model, state, mapping)
    with pytest.raises(ValueError, match="0"):
        qcompile.requantize(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 33)), state, mapping)
    with pytest.raises(ValueError, match="no modules"):
        qcompile.requantize(nn.Linear(64, 97), state, mapping)
    with pytest.raises(ValueError, match="nothing in the model is quantized"):
        qcompile.quantization_map(_mlp())


KINDS: dict[str, Callable[[], nn.Module]] = {
    "root": lambda: nn.Linear(64, 33),
    "conv": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose1d(8, 4, 3, groups=2)),
    "columns": lambda: nn.Sequential(Conv1D(33, 64)),
    "recurrent": lambda: nn.GRU(32, 16, 2, bidirectional=True),
    "attention": lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
    "tables": lambda: nn.Sequential(nn.Embedding(50, 40), nn.EmbeddingBag(50, 40)),
}


@pytest.mark.parametrize("start", ["real", "meta"])
@pytest.mark.parametrize("weights", ["qint3", "qint8", "qfloat8_e5m2"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, weights: str, start: str) -> None:
    model = qcompile.freeze(qcompile.quantize(KINDS[kind](), weights=weights, activations="qint8"))
    mapping = json.loads(json.dumps(qcompile.quantization_map(model)))
    with torch.device("meta" if start == "meta" else "cpu"):
        fresh = KINDS[kind]()
    fresh = qcompile.requantize(fresh, model.state_dict(), mapping, device="cpu")
    assert qcompile.quantization_map(fresh) == mapping
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    state, again = model.state_dict(), fresh.state_dict()
    assert list(state) == list(again)
    for name, value in state.items():
        assert again[name].dtype == value.dtype and torch.equal(again[name].float(), value.float()), name
    for name, buffer in model.named_buffers():
        assert torch.equal(fresh.get_buffer(name).float(), buffer.float()), "and as they are held"


def test_an_unfrozen_model_comes_back_unfrozen() -> None:
    model = qcompile.quantize(_mlp(), weights="qint4", activations="qint8")
    fresh = qcompile.requantize(_mlp(), model.state_dict(), qcompile.quantization_map(model))
    assert not fresh[0].frozen and isinstance(fresh[0]._parameters["weight"], nn.Parameter)
    x = torch.randn(5, 64)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(qcompile.freeze(fresh)(x), qcompile.freeze(model)(x), rtol=0, atol=0)
