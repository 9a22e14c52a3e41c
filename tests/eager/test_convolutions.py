"""Frozen convolutions on the CPU's kernels: the float64 result, torch's own layout, and never what was packed before."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from eager import KERNEL, error, rounded
from torch import Tensor, nn

import qcompile

# Each pays on the kernel: many output channels for what it reads, or a kernel for each channel.
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "plain": (lambda **o: nn.Conv2d(32, 256, 3, padding=1, **o), (1, 32, 9, 7)),
    "one-sided": (lambda **o: nn.Conv2d(32, 256, (3, 2), padding="same", **o), (2, 32, 7, 6)),
    "valid": (lambda **o: nn.Conv2d(20, 256, 3, padding="valid", **o), (1, 20, 7, 6)),
    "strides": (lambda **o: nn.Conv2d(64, 193, (3, 1), stride=(2, 1), dilation=(1, 2), padding=(2, 0), **o), (3, 64, 9, 5)),
    "reflected": (lambda **o: nn.Conv2d(32, 256, 3, padding=(1, 2), padding_mode="reflect", **o), (1, 32, 8, 8)),
    "pointwise": (lambda **o: nn.Conv2d(193, 160, 1, **o), (1, 193, 3, 5)),
    "groups": (lambda **o: nn.Conv2d(128, 320, 3, groups=2, **o), (1, 128, 6, 5)),
    "depthwise": (lambda **o: nn.Conv2d(97, 97, 7, padding=3, groups=97, **o), (2, 97, 9, 7)),
    "patches": (lambda **o: nn.Conv2d(3, 192, 8, 8, **o), (1, 3, 24, 32)),
    "sound": (lambda **o: nn.Conv1d(97, 193, 3, padding=1, bias=False, **o), (2, 97, 13)),
    "causal": (lambda **o: nn.Conv1d(64, 64, 19, groups=64, dilation=2, padding=36, **o), (1, 64, 20)),
}


def _input(*shape: int) -> Tensor:
    x = torch.randn(shape)
    x.view(-1)[:: max(1, x.numel() // 7)] *= 20
    return x


def _frozen(layer: nn.Module, weights: str = "qint8") -> Any:
    return qcompile.freeze(qcompile.quantize(copy.deepcopy(layer), weights=weights))


def _is_packed(module: Any) -> bool:
    return any(made.is_packed for made in module.q_weight.convolutions.values())


@pytest.mark.parametrize("weights", ["qint8", "qint4", "qint3"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, weights: str) -> None:
    make, shape = CASES[case]
    layer, x = make(), _input(*shape)
    module = _frozen(layer, weights)
    with torch.no_grad():
        expected = rounded(layer, module)(x.double())
        for given in (x, *([x.to(memory_format=torch.channels_last)] if x.dim() == 4 else [])):
            y = module(given)
            assert error(y, expected) < KERNEL
            assert y.stride() == layer(given).stride()
    assert _is_packed(module) and "where that pays" in str(qcompile.report(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer, x = CASES["plain"][0](dtype=dtype), _input(1, 32, 9, 7).to(dtype)
    module = _frozen(layer)
    y = module(x)
    assert y.dtype == dtype and _is_packed(module)
    assert error(y, rounded(layer, module)(x.double())) < KERNEL


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 32, 3, 2, 1), (1, 3, 64, 64)),  # few channels: patches to gather, little to multiply
        (nn.Conv2d(64, 64, 3, groups=4), (1, 64, 28, 28)),  # narrow groups
        (nn.Conv2d(64, 16, 1), (1, 64, 28, 28)),  # moved to the kernel's layout and back for nothing
        (nn.Conv2d(96, 96, 3, groups=96), (1, 96, 14, 14)),
        (nn.Conv2d(64, 256, 3), (64, 5, 5)),  # no batch
        (nn.Conv3d(4, 8, 3), (1, 4, 5, 5, 5)),
    ],
)
def test_what_does_not_pay_is_decoded(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Then nothing is rounded but the weight, and it is not packed a second time."""
    module, x = _frozen(layer), _input(*shape)
    for _ in range(2):
        assert error(module(x), rounded(layer, module)(x.double())) < 1e-5
    assert not _is_packed(module)


@pytest.mark.parametrize("case", ["plain", "depthwise", "sound"])
def test_gradients_go_through(case: str) -> None:
    make, shape = CASES[case]
    layer = make()
    module, x = _frozen(layer), _input(*shape).requires_grad_()
    reference, wide = rounded(layer, module), x.detach().double().requires_grad_()
    toward = torch.randn_like(layer(x))
    module(x).backward(toward)
    reference(wide).backward(toward.double())
    assert _is_packed(module) and error(x.grad, wide.grad) < KERNEL
    if layer.bias is not None:
        assert error(module.bias.grad, reference.bias.grad) < 1e-5


@pytest.mark.parametrize("make", [CASES["plain"][0], lambda: nn.Conv2d(32, 16, 3)], ids=["packed", "decoded"])
def test_other_codes_are_taken(make: Any) -> None:
    first, second, x = make(), make(), _input(1, 32, 9, 7)
    module, other = _frozen(first), _frozen(second)
    module(x)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x)) and error(module(x), first(x)) > 0.5
    cast = module.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert cast.dtype == torch.bfloat16 and error(cast, other(x)) < KERNEL


def test_another_window_is_packed_for_itself() -> None:
    """Modules may share a weight, and a stride may be set later."""
    layer, x = CASES["plain"][0](), _input(1, 32, 9, 7)
    module = _frozen(layer)
    module(x)
    for name, value in (("stride", (2, 2)), ("dilation", (2, 1)), ("padding_mode", "circular")):
        setattr(module, name, value), setattr(layer, name, value)
        assert error(module(x), rounded(layer, module)(x.double())) < KERNEL


def test_copies_hold_their_own() -> None:
    module, x = _frozen(CASES["plain"][0]()), _input(1, 32, 9, 7)
    y, file = module(x), io.BytesIO()
    pickle.dump(module, file)
    file.seek(0)
    for copied in (copy.deepcopy(module), pickle.load(file)):
        assert not _is_packed(copied) and torch.equal(copied(x), y)
    assert _is_packed(module) and torch.equal(module(x), y)


def test_what_does_not_fit_is_said_by_torch() -> None:
    module = _frozen(CASES["plain"][0]())
    for x in (torch.randn(1, 31, 9, 7), torch.randn(1, 32, 9, 7).bfloat16(), torch.randn(9, 7)):
        with pytest.raises(RuntimeError):
            module(x)
    assert module(torch.randn(0, 32, 9, 7)).shape == (0, 256, 9, 7)
