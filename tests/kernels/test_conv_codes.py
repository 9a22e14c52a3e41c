"""Convolutions on activations with one scale, floats and int8 codes, on every instruction set, against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conv_cases import DENSE, DEPTHWISE, SCHEMES, Case, Packed, packed
from oracle import data, opcheck
from torch import Tensor

SCALE = torch.tensor(0.37)
OUT_SCALE = torch.tensor(0.11)
EXACT = 1e-5
BOUNDS = {torch.float32: EXACT, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def codes_of(x: Tensor) -> Tensor:
    """What ``fake_quantize`` rounds to, in float64."""
    return (x.float() / SCALE).round().clamp(-127, 127).double()


def forms(x: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """The same activations as floats that are to be rounded, and as codes of two memory formats."""
    codes = codes_of(x).to(torch.int8)
    last = codes if x.dim() == 3 else codes.contiguous(memory_format=torch.channels_last)
    taken = {"x_scale": SCALE, "dtype": x.dtype}
    return [(x, {"x_scale": SCALE}), (codes, taken), (last, taken)]


def off(written: Tensor, expected: Tensor) -> float:
    """How far codes are from what they stand for, in steps; and what float32 may add to it taken off."""
    steps = expected / OUT_SCALE.double()
    return float((written.double() - steps.clamp(-127, 127)).abs().max()) - 3e-5 * max(1.0, float(steps.abs().max()))


def check(
    conv: Packed, x: Tensor, act: Callable[[Tensor], Tensor] = lambda y: y, *, same: bool = True, **options: Any
) -> None:
    """Floats and codes out, of floats and codes in; ``same``: to the last bit, whatever the form of x."""
    bias, add = torch.randn(conv.case.out), options.get("add")
    rounded = codes_of(x) * SCALE.double()
    expected = act(conv.expected(rounded, bias))
    floats, written = [], []
    for form, taken in forms(x):
        floats.append(conv.call(form, bias, **taken, **options))
        written.append(conv.call(form, bias, out_scale=OUT_SCALE, **taken, **options))
        assert floats[-1].shape == expected.shape and floats[-1].dtype == x.dtype and written[-1].dtype == torch.int8
    for y, w in zip(floats, written, strict=True):
        assert not same or (torch.equal(y, floats[0]) and torch.equal(w, written[0])), conv.case
        if x.shape[0]:
            assert conv.error(y, expected, rounded) <= BOUNDS[x.dtype] + (0 if add is None else 2e-3), conv.case
            assert off(w, expected) <= 0.5, conv.case


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_any_shape(isa: str, scheme: Any) -> None:
    for case in DENSE:
        for batch in (0, 1, 3):
            check(packed(case, scheme), data(batch, case.channels, *case.size, seed=batch))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_depthwise_shapes(isa: str, scheme: Any) -> None:
    for case in DEPTHWISE:
        for batch in (0, 2):
            check(packed(case, scheme, depthwise=True), data(batch, case.channels, *case.size))


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_square_depthwise_kernels(isa: str, size: int, stride: int) -> None:
    """Whole lines of channels and what is left of them, bands that end early, zeros on all sides and on some."""
    for channels, image, before, after in (
        (64, (8, 14), (size // 2, size // 2), None),
        (150, (9, 17), (1, 0), (0, 2)),
        (80, (7, 31), (0, 2), (2, 1)),
        (112, (5, 5), (2, 2), (3, 1)),
    ):
        case = Case(channels, image, channels, (size, size), (stride, stride), before, after, groups=channels)
        for scheme in (SCHEMES[0], SCHEMES[-1]):
            conv = packed(case, scheme, depthwise=True)
            check(conv, data(2, channels, *image))
            check(conv, data(1, channels, *image), torch.nn.functional.relu6, activation="relu6")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_references(scheme: Any) -> None:
    for depthwise, cases in ((False, DENSE), (True, DEPTHWISE)):
        for case in cases:
            conv = packed(case, scheme, depthwise=depthwise, reference=True)
            check(conv, data(2, case.channels, *case.size), same=False)


def _summed(act: Callable[[Tensor], Tensor], add: Tensor, then: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    return then(act(y) + add.double())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_dtypes_and_epilogues(isa: str, depthwise: bool, dtype: torch.dtype) -> None:
    for channels in (24, 35):
        case = Case(channels, (6, 5), channels, (3, 3), before=(1, 1), groups=channels if depthwise else 1)
        conv = packed(case, SCHEMES[0], depthwise=depthwise)
        x, add = (data(2, channels, 6, 5) / 9).to(dtype), torch.randn(2, channels, 6, 5).to(dtype)
        for name, act in ACTIVATIONS.items():
            check(conv, x, act, activation=name)
            for after, then in (("none", ACTIVATIONS["none"]), ("relu", torch.relu), ("silu", ACTIVATIONS["silu"])):
                summed = partial(_summed, act, add, then)
                check(conv, x, summed, activation=name, add=add, after=after)


def test_large_images_are_read_in_segments_and_bands(isa: str) -> None:
    for case in (
        Case(17, (5, 300), 17, (3, 3), before=(1, 1), groups=17),
        Case(16, (40, 131), 16, (5, 5), (2, 2), (2, 2), groups=16),
        Case(20, (700,), 20, (7,), (3,), (3,), dilation=(2,), groups=20),
    ):
        check(packed(case, SCHEMES[0], depthwise=True), data(1, case.channels, *case.size))


@pytest.mark.parametrize("depthwise", [False, True])
def test_the_same_codes_on_any_number_of_threads(isa: str, depthwise: bool) -> None:
    for size, channels in ((5, 64), (30, 64), (15, 200)):
        case = Case(channels, (size, size), channels, (3, 3), before=(1, 1), groups=channels if depthwise else 1)
        conv, x = packed(case, SCHEMES[0], depthwise=depthwise), data(1, channels, size, size)
        forms = [(x, {"x_scale": SCALE}), (codes_of(x).to(torch.int8), {"x_scale": SCALE, "dtype": x.dtype})]
        for form, taken in forms:
            one = conv.call(form, out_scale=OUT_SCALE, **taken)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                for _ in range(5):  # threads divide the work anew each time
                    assert torch.equal(conv.call(form, out_scale=OUT_SCALE, **taken), one)
            torch.set_num_threads(1)


@pytest.mark.parametrize("depthwise", [False, True])
def test_infinity_saturates(isa: str, depthwise: bool) -> None:
    case = Case(32, (6, 6), 32, (3, 3), before=(1, 1), groups=32 if depthwise else 1)
    conv, x = packed(case, SCHEMES[0], depthwise=depthwise), torch.randn(1, 32, 6, 6)
    x[0, 5, 2, 2], x[0, 7, 1, 1] = float("inf"), -float("inf")
    assert torch.equal(conv.call(x, x_scale=SCALE), conv.call(x.clamp(-1e3, 1e3), x_scale=SCALE))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_nan_is_handed_on(isa: str, depthwise: bool, reference: bool) -> None:
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[1:4, 1:4] = True
    for scheme in SCHEMES[:2]:
        for channels, bad_one in ((40, 37), (96, 70)):
            case = Case(channels, (8, 8), channels, (3, 3), before=(1, 1), groups=channels if depthwise else 1)
            conv, x = packed(case, scheme, depthwise=depthwise, reference=reference), torch.randn(1, channels, 8, 8)
            x[0, bad_one, 2, 2] = float("nan")
            codes = torch.where(x.isnan(), torch.tensor(-128, dtype=torch.int8), codes_of(x).nan_to_num().to(torch.int8))
            for form, dtype in ((x, None), (codes, torch.float32)):
                taken = {"x_scale": SCALE, "dtype": dtype}
                bad = conv.call(form, activation="relu6", **taken).isnan().any(dim=1)[0]
                written = conv.call(form, activation="relu6", out_scale=OUT_SCALE, **taken)
                assert torch.equal(bad, seen) and torch.equal((written == -128).any(dim=1)[0], seen)


@pytest.mark.parametrize("depthwise", [False, True])
def test_results_beyond_32_bits_saturate(isa: str, depthwise: bool) -> None:
    case = Case(64, (6, 7), 64, (3, 3), before=(1, 1), groups=64 if depthwise else 1)
    conv, x = packed(case, SCHEMES[0], depthwise=depthwise), data(1, 64, 6, 7)
    for scale in (torch.tensor(1e-30), torch.tensor(1e-36)):
        y = conv.call(x, x_scale=SCALE)
        written = conv.call(x, x_scale=SCALE, out_scale=scale)
        assert torch.equal(written, (y.sign() * 127).to(torch.int8))


@pytest.mark.parametrize("depthwise", [False, True])
def test_opcheck(depthwise: bool) -> None:
    case = Case(24, (5, 6), 24, (3, 3), (2, 1), (1, 1), groups=24 if depthwise else 1)
    conv = packed(case, SCHEMES[0], depthwise=depthwise)
    for form, taken in forms(data(2, 24, 5, 6)):
        for out_scale in (None, OUT_SCALE):
            opcheck(conv.kernel.target, conv.arguments(form, out_scale=out_scale, **taken))


def test_rounded_activations_have_no_gradient() -> None:
    conv = packed(Case(16, (5, 5), 16, (3, 3)), SCHEMES[0])
    with pytest.raises(ValueError, match="fake_quantize before"):
        conv.call(torch.randn(1, 16, 5, 5, requires_grad=True), x_scale=SCALE)


@pytest.mark.parametrize("depthwise", [False, True])
def test_wrong_arguments_are_said(depthwise: bool) -> None:
    case = Case(32, (5, 5), 32, (3, 3), groups=32 if depthwise else 1)
    codes, x = torch.zeros(1, 32, 5, 5, dtype=torch.int8), torch.randn(1, 32, 5, 5)
    for bad, options in (
        (codes, {"dtype": torch.float32}),
        (codes, {"x_scale": SCALE}),
        (codes, {"x_scale": SCALE, "dtype": torch.float64}),
        (codes.to(torch.uint8), {"x_scale": SCALE, "dtype": torch.float32}),
        (x, {"x_scale": SCALE, "dtype": torch.float16}),
        (x, {"x_scale": SCALE.double()}),
        (x, {"x_scale": SCALE.reshape(1)}),
        (x, {"x_scale": torch.tensor(0.0)}),
        (x, {"x_scale": SCALE, "out_scale": torch.tensor(-1.0)}),
        (codes, {"x_scale": SCALE, "dtype": torch.float16, "bias": torch.zeros(32, dtype=torch.bfloat16)}),
        (codes, {"x_scale": SCALE, "dtype": torch.float16, "add": torch.randn(1, 32, 3, 3)}),
    ):
        for reference in (False, True):
            with pytest.raises((ValueError, RuntimeError), match="qcompile::conv_"):
                packed(case, SCHEMES[0], depthwise=depthwise, reference=reference).call(bad, **options)
