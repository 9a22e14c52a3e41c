"""Packing undone: kernel by kernel, and out of a stack of siblings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import SCHEMES, data

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.dispatch import choose
from qcompile.passes.restore import restore


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "channel=-1" not in s and "=1/" not in s])
@pytest.mark.parametrize("form", ["whole", "parts", "glu"])
def test_unpack_is_the_inverse_of_pack(scheme: str, form: str) -> None:
    weight = QTensor.quantize(data(50, 97), Scheme.parse(scheme))
    kernel, why = choose("linear", "cpu", weight.scheme, weight.shape, torch.float32)
    assert kernel is not None and kernel.unpack is not None, why
    how = ((7, 43) if form == "parts" else None, form == "glu")
    back = kernel.unpack(kernel.pack(weight, *how), weight.scheme, weight.shape, *how)
    assert torch.equal(back.data, weight.data)
    assert torch.equal(back.scale, weight.scale)
    assert (back.zero is None and weight.zero is None) or torch.equal(back.zero, weight.zero)  # type: ignore[arg-type]


@pytest.mark.parametrize("glu", [False, True])
def test_a_member_of_a_stack_comes_back(glu: bool) -> None:
    scheme = Scheme.parse("qint4/group=32/affine/float16")
    weights = [QTensor.quantize(data(20, 64, seed=i), scheme) for i in range(2)]
    whole = QTensor.quantize(torch.cat([w.dequantize() for w in weights]), scheme)
    whole = QTensor(
        torch.cat([w.data for w in weights]), torch.cat([w.scale for w in weights]),
        torch.cat([w.zero for w in weights if w.zero is not None]), scheme, whole.shape,
    )  # fmt: skip
    kernel, _ = choose("linear", "cpu", scheme, whole.shape, torch.float32)
    assert kernel is not None
    parts = None if glu else (20, 20)
    names = [("q", ("id", i), scheme, "max", "data") for i in range(2)]
    empty = [QTensor(*(t.to("meta") for t in (w.data, w.scale, w.zero)), scheme, w.shape) for w in weights]  # type: ignore[union-attr]
    memo: dict[tuple[object, ...], Any] = {
        **{("weight", ("id", i), scheme, "max"): (empty[i], 0.25) for i in range(2)},
        ("packed", ("stack", *names), kernel.pack, parts, glu): kernel.pack(whole, parts, glu),
    }
    found = restore(memo, lambda key: key[1] == ("id", 1))
    assert list(found) == [("weight", ("id", 1), scheme, "max")]
    value, error = memo[("weight", ("id", 1), scheme, "max")]
    assert error == 0.25
    assert torch.equal(value.data, weights[1].data) and torch.equal(value.scale, weights[1].scale)
    assert torch.equal(value.zero, weights[1].zero)
    assert memo[("weight", ("id", 0), scheme, "max")][0].data.is_meta
    assert restore({}, lambda key: True) == {}
