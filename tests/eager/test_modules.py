"""Every kind of module: quantized and frozen it computes what the float module computes with the codes' values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import KERNEL, doubled, error, rounded
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qcompile
from qcompile import QModuleMixin

Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]


def _floats(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape),)


def _indices(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(0, 50, shape),)


def _attention() -> tuple[Tensor, ...]:
    x = torch.randn(5, 2, 32)
    return x, x, x


CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(64, 33), _floats(3, 5, 64)),
    "linear-no-bias": (lambda: nn.Linear(97, 160, bias=False), _floats(7, 97)),
    "linear-odd": (lambda: nn.Linear(193, 7), _floats(1, 193)),
    "linear-vector": (lambda: nn.Linear(64, 33), _floats(64)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, groups=4), _floats(2, 8, 10)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), _floats(2, 8, 10, 9)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, (3, 2), groups=2, stride=2, dilation=2), _floats(2, 8, 10, 9)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 3, stride=2), _floats(1, 8, 6, 5, 7)),
    "conv-transposed1d": (lambda: nn.ConvTranspose1d(8, 12, 3, groups=4), _floats(2, 8, 10)),
    "conv-transposed2d": (lambda: nn.ConvTranspose2d(8, 12, 3, groups=2, stride=2, output_padding=1), _floats(2, 8, 5, 4)),
    "conv-transposed3d": (lambda: nn.ConvTranspose3d(8, 6, 3), _floats(1, 8, 3, 4, 2)),
    "embedding": (lambda: nn.Embedding(50, 40), _indices(3, 4)),
    "embedding-padding": (lambda: nn.Embedding(50, 40, padding_idx=0), lambda: (torch.tensor([[0, 3], [49, 0]]),)),
    "embedding-bag": (lambda: nn.EmbeddingBag(50, 40), _indices(3, 4)),
    "attention": (lambda: nn.MultiheadAttention(32, 4), _attention),
    "attention-batch-first": (
        lambda: nn.MultiheadAttention(32, 4, batch_first=True), lambda: (torch.randn(5, 2, 32),) * 3
    ),
    "attention-sizes": (
        lambda: nn.MultiheadAttention(32, 4, kdim=16, vdim=24),
        lambda: (torch.randn(5, 2, 32), torch.randn(6, 2, 16), torch.randn(6, 2, 24)),
    ),
    "lstm": (lambda: nn.LSTM(32, 16, 2, bidirectional=True), _floats(5, 2, 32)),
    "lstm-projected": (lambda: nn.LSTM(32, 16, batch_first=True, proj_size=8), _floats(2, 5, 32)),
    "gru": (lambda: nn.GRU(32, 16, bidirectional=True), _floats(5, 2, 32)),
    "rnn": (lambda: nn.RNN(32, 16), _floats(5, 2, 32)),
    "lstm-cell": (lambda: nn.LSTMCell(32, 16), _floats(3, 32)),
    "gru-cell": (lambda: nn.GRUCell(32, 16), _floats(3, 32)),
    "bilinear": (lambda: nn.Bilinear(32, 24, 16), lambda: (torch.randn(5, 32), torch.randn(5, 24))),
    "columns": (lambda: Conv1D(33, 64), _floats(3, 5, 64)),
    "encoder-layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), _floats(2, 5, 32)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2), _floats(2, 5, 32)
    ),
    "decoder-layer": (
        lambda: nn.TransformerDecoderLayer(32, 4, 64, batch_first=True),
        lambda: (torch.randn(2, 5, 32), torch.randn(2, 6, 32)),
    ),
}  # fmt: skip

#: Those whose products run in the kernel once or more: its rounding adds up.
DEEP = 4 * KERNEL


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weights", ["qint4", "qfloat8"])  # packed for a kernel, and not
def test_kinds(name: str, weights: str) -> None:
    make, arguments = CASES[name]
    original = make().eval()
    with torch.no_grad():
        for parameter in original.parameters():  # nothing is left zero, and some weights stand out
            parameter.add_(torch.randn_like(parameter) * 0.1)
            parameter.view(-1)[0] *= 5
    args = arguments()
    model = qcompile.quantize(copy.deepcopy(original), weights=weights)
    bound = 1e-5 if weights == "qfloat8" else DEEP
    with torch.no_grad():
        expected = rounded(original, model)(*doubled(args))
        assert error(model(*args), expected) < 1e-5, "unfrozen: float arithmetic on the codes' values"
        assert error(expected, original(*args)) > 1e-4, "quantization changed nothing"
        frozen = qcompile.freeze(model)
        assert not [n for n, m in frozen.named_modules() if isinstance(m, QModuleMixin) and not m.frozen]
        assert error(frozen(*args), expected) < bound
    assert error(frozen(*args), expected) < bound, "with gradients enabled"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", list(qcompile.qtypes))
def test_dtypes(weights: str, dtype: torch.dtype) -> None:
    original = nn.Linear(97, 33).to(dtype)
    x = torch.randn(5, 97, dtype=dtype)
    x[0, 3] *= 30
    model = qcompile.freeze(qcompile.quantize(copy.deepcopy(original), weights=weights))
    y = model(x)
    assert y.dtype == dtype and error(y, rounded(original, model)(x.double())) < KERNEL
    assert model.weight.dtype == dtype
    bits = qcompile.qtypes[weights].bits
    largest = {2: 0.6, 3: 0.25, 4: 0.12, 5: 0.06, 6: 0.03, 8: 0.06 if "float" in weights else 0.01}[bits]
    assert error(model.weight.dequantize(), original.weight) < largest


@pytest.mark.parametrize("activations", ["qint8", "qfloat8_e4m3fn", "qfloat8_e5m2", "qfloat8_e4m3fnuz"])
@pytest.mark.parametrize("weights", ["qint2", "qint4", "qint8", "qfloat8", None])
def test_weights_and_activations(weights: str | None, activations: str) -> None:
    original = nn.Linear(96, 32)
    x = torch.randn(5, 7, 96)
    model = qcompile.quantize(copy.deepcopy(original), weights=weights, activations=activations)
    reference = rounded(original, model)
    kind = qcompile.qtype(activations)
    by_token = torch.ops.qcompile.fake_quantize_dynamic(x, activations)
    assert error(model(x), reference(by_token.double())) < 1e-5
    with qcompile.Calibration(streamline=False):
        y = model(x)
    assert error(y, reference(x.double())) < 1e-5, "calibrating, activations stay as they are"
    scale = x.abs().max() / kind.qmax
    steps = (x.double() / scale).clamp(kind.qmin, kind.qmax)
    codes = steps.float().to(kind.dtype).double() if kind.is_float else steps.round()
    out = reference(codes * scale)
    unfrozen = model(x)
    assert error(unfrozen, out) < (0.06 if kind.name == "qfloat8_e5m2" else 0.03)  # the output's rounding
    assert unfrozen.unique().numel() <= 256
    if weights is not None:
        assert error(qcompile.freeze(model)(x), out) < (0.08 if kind.is_float else 0.04)


def test_shapes_that_are_empty_or_not_contiguous() -> None:
    original = nn.Linear(64, 33)
    model = qcompile.freeze(qcompile.quantize(copy.deepcopy(original), weights="qint4", activations="qint8"))
    assert model(torch.randn(0, 64)).shape == (0, 33) and model(torch.randn(3, 0, 64)).shape == (3, 0, 33)
    x = torch.randn(64, 10).t()
    assert not x.is_contiguous()
    torch.testing.assert_close(model(x), model(x.contiguous()))
    single = nn.Linear(1, 1)
    held = qcompile.freeze(qcompile.quantize(copy.deepcopy(single), weights="qint4"))
    assert error(held(x[:, :1]), single(x[:, :1])) < 0.01
    wide = torch.randn(10, 128)
    torch.testing.assert_close(model(wide[:, ::2]), model(wide[:, ::2].contiguous()))


def test_a_wrong_input_is_refused() -> None:
    model = qcompile.freeze(qcompile.quantize(nn.Linear(64, 33), weights="qint4"))
    for wrong in (63, 65, 96, 32):  # 63 features fill as many groups as 64 do
        with pytest.raises(ValueError, match=rf"64.*\[2, {wrong}\]"):
            model(torch.randn(2, wrong))
        with pytest.raises(RuntimeError, match="shapes"):
            nn.functional.linear(torch.randn(2, wrong), model.weight)
    with pytest.raises((RuntimeError, TypeError), match="float32"):
        model(torch.randint(0, 3, (2, 64)))
    with_activations = qcompile.freeze(qcompile.quantize(nn.Linear(64, 33), weights="qint4", activations="qint8"))
    with pytest.raises(ValueError, match=r"64.*\[2, 63\]"):
        with_activations(torch.randn(2, 63))


def test_float64_is_left_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = qcompile.quantize(nn.Linear(64, 64).double())
    assert "float64" in caplog.text and not isinstance(model, QModuleMixin)


@pytest.mark.parametrize("gradients", [False, True])
def test_no_fast_path_goes_round_the_codes(gradients: bool) -> None:
    """torch's fused encoder reads the children's float weights and never calls them, in eval mode without gradients."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    original = nn.TransformerEncoder(layer, 2).eval().requires_grad_(gradients)
    model = qcompile.quantize(copy.deepcopy(original), weights="qint2", activations="qint8")
    x, mask = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(gradients):
        y, expected = model(x, src_key_padding_mask=mask), original(x, src_key_padding_mask=mask)
        assert 0.01 < error(y[0], expected[0]) < 1
        again = qcompile.freeze(model)(x, src_key_padding_mask=mask)
    assert error(again[0], y[0]) < 0.1


def test_a_shared_table_is_held_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(160, 64)
            self.head = nn.Linear(64, 160, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens))

    original = Tied()
    model = qcompile.freeze(qcompile.quantize(copy.deepcopy(original), weights="qint4"))
    assert model.table.q_weight is model.head.q_weight
    assert model.head.q_weight.scheme.qtype is qcompile.qint8, "a table has 8 bits, and so has who shares it"
    held = sum({b.data_ptr(): b.numel() * b.element_size() for b in model.buffers()}.values())
    assert held < 1.2 * original.table.weight.numel(), "about a byte an element, once"
    tokens = torch.randint(0, 160, (2, 7))
    assert error(model(tokens), rounded(original, model)(tokens)) < KERNEL


def test_classes_stay_what_they_were() -> None:
    model = qcompile.quantize(nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 16, 3), nn.LayerNorm(64)), activations="qint8")
    linear, conv, norm = model
    assert isinstance(linear, nn.Linear) and isinstance(linear, qcompile.QLinear)
    assert isinstance(conv, nn.Conv2d) and isinstance(conv, qcompile.QConv2d)
    assert isinstance(norm, nn.LayerNorm) and isinstance(norm, qcompile.QLayerNorm)
    assert "qint8/" in repr(linear) and "in_features=64" in repr(linear) and "activations: qint8" in repr(linear)
