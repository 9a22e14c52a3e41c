"""Convolutions on activations with one scale, floats and int8 codes, on every instruction set and as references, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import DENSE, DEPTHWISE, SCHEMES, Case, Packed, packed
from oracle import data, opcheck
from torch import Tensor

SCALE = torch.tensor(0.37)
EXACT = 1e-5
BOUNDS = {torch.float32: EXACT, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def codes_of(x: Tensor, scale: Tensor = SCALE) -> Tensor:
    """What ``fake_quantize`` rounds to, in float64."""
    return (x.float() / scale).round().clamp(-127, 127).double()


def forms(x: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """The same activations as floats that are to be rounded, and as codes of two memory formats."""
    codes = codes_of(x).to(torch.int8)
    last = codes if x.dim() == 3 else codes.contiguous(memory_format=torch.channels_last)
    taken = {"x_scale": SCALE, "dtype": x.dtype}
    return [(x, {"x_scale": SCALE}), (codes, taken), (last, taken)]


def check(conv: Packed, x: Tensor, bound: float) -> None:
    """Floats and codes out, of floats and codes in."""
    bias, out_scale = torch.randn(conv.case.out), torch.tensor(0.11)
    rounded = codes_of(x) * SCALE.double()
    expected = conv.expected(rounded, bias)
    results = [(conv.call(form, bias, **taken), conv.call(form, bias, out_scale=out_scale, **taken)) for form, taken in forms(x)]
    for y, written in results:
        assert y.shape == expected.shape and y.dtype == x.dtype and written.dtype == torch.int8
        if x.shape[0]:
            assert conv.error(y, expected, rounded) <= bound, conv.case
            steps = expected / out_scale.double()
            off = (written.double() - steps.clamp(-127, 127)).abs()  # half a step, and what float32 adds to it
            assert float(off.max()) <= 0.5 + 3e-5 * max(1.0, float(steps.abs().max())), conv.case
    for y, written in results[1:]:  # codes are what the kernel makes of the floats itself
        assert torch.equal(y, results[0][0]) and torch.equal(written, results[0][1])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_any_shape(isa: str, scheme: Any) -> None:
    for case in DENSE:
        for batch in (0, 1, 3):
            check(packed(case, scheme), data(batch, case.channels, *case.size, seed=batch), EXACT)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_depthwise_shapes(isa: str, scheme: Any) -> None:
    for case in DEPTHWISE:
        for batch in (0, 2):
            check(packed(case, scheme, depthwise=True), data(batch, case.channels, *case.size), EXACT)
