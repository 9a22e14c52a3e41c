"""Where an operator has no kernel Inductor generates its code: held against the reference, runs cut short included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.inductor import prepare
from qcompile.kernels import QTensor, Scheme


@pytest.mark.parametrize(
    "text",
    [
        "qint8/group=32/symmetric/float16",
        "qint8/group=32/affine/float16",
        "qint4/group=32/affine/float16",
        "qint3/group=48/shift/float32",
        "qint6/block=16x32/affine/bfloat16",
        "qfloat8_e4m3fn/group=32/symmetric/float32",
    ],
)
def test_dequantize_compiled_is_the_reference(text: str) -> None:
    prepare()
    shapes = ([2, 32, 48], [32, 48], [19, 97], [5, 160], [16, 64])
    values = [QTensor.quantize(torch.randn(shape), Scheme.parse(text)) for shape in shapes]

    def decode(parts: list[tuple[Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
        return [
            torch.ops.qcompile.dequantize(*part, text, shape, torch.float32)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    got = torch.compile(decode, fullgraph=True)([(v.data, v.scale, v.zero) for v in values])
    for result, value in zip(got, values, strict=True):
        torch.testing.assert_close(result, value.dequantize(), rtol=1e-6, atol=1e-6)
