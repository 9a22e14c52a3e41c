from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme
from qcompile.kernels.ops.conv import matrix_shape, rows_of, weight_of

conv = torch.ops.qcompile.conv

# dims, transposed, groups, stride, padding, dilation, output_padding
CASES = [
    (1, False, 1, 1, 0, 1, 0),
    (1, False, 2, 2, 1, 2, 0),
    (1, True, 2, 2, 1, 1, 1),
    (2, False, 1, 1, 1, 1, 0),
    (2, False, 4, 2, 0, 1, 0),
    (2, True, 1, 2, 1, 2, 1),
    (2, True, 2, 1, 0, 1, 0),
    (3, False, 1, 1, 1, 2, 0),
    (3, True, 2, 2, 1, 1, 0),
]


def _case(
    case: tuple[int, bool, int, int, int, int, int], text: str, dtype: torch.dtype = torch.float32, batch: int = 2
) -> tuple[torch.Tensor, QTensor, torch.Tensor, list[Any]]:
    """Input, quantized weight matrix, bias, and the arguments that follow the scheme."""
    dims, transposed, groups, *rest = case
    channels_in, channels_out, kernel = 8, 12, [3, 2, 3][:dims]
    shape = [channels_in, channels_out // groups] if transposed else [channels_out, channels_in // groups]
    shape += kernel
    weight = oracle.data(*shape)
    q = QTensor.quantize(rows_of(weight, transposed, groups), Scheme.parse(text))
    stride, padding, dilation, output_padding = ([value] * dims for value in rest)
    x = oracle.data(batch, channels_in, *[9, 8, 7][:dims], dtype=dtype, seed=1)
    arguments = [shape, stride, padding, dilation, transposed, output_padding, groups]
    return x, q, oracle.data(channels_out, dtype=dtype, seed=2), arguments


def _direct(x: oracle.Array, matrix: oracle.Array, bias: oracle.Array, arguments: list[Any]) -> oracle.Array:
    """Convolution as its definition says, one kernel tap at a time; rows of the matrix are output channels."""
    shape, stride, padding, dilation, transposed, output_padding, groups = arguments
    kernel, dims, channels_out = shape[2:], len(shape) - 2, matrix.shape[0]
    per_in, per_out = x.shape[1] // groups, channels_out // groups
    weight = matrix.reshape(groups, per_out, per_in, *kernel)
    grouped = x.reshape(x.shape[0], groups, per_in, *x.shape[2:])
    size = x.shape[2:]
    span = [dilation[d] * (kernel[d] - 1) + 1 for d in range(dims)]
    if transposed:
        out_size = [(size[d] - 1) * stride[d] + span[d] + output_padding[d] for d in range(dims)]
    else:
        out_size = [(size[d] + 2 * padding[d] - span[d]) // stride[d] + 1 for d in range(dims)]
        grouped = np.pad(grouped, [(0, 0)] * 3 + [(p, p) for p in padding])
    out = np.zeros((x.shape[0], groups, per_out, *out_size))
    for tap in itertools.product(*map(range, kernel)):
        start = [tap[d] * dilation[d] for d in range(dims)]
        tap_weight = weight[(slice(None),) * 3 + tap]
        count = size if transposed else out_size
        strided = tuple(slice(start[d], start[d] + stride[d] * (count[d] - 1) + 1, stride[d]) for d in range(dims))
        if transposed:
            out[(slice(None),) * 3 + strided] += np.einsum("bgi...,goi->bgo...", grouped, tap_weight)
        else:
            out += np.einsum("bgi...,goi->bgo...", grouped[(slice(None),) * 3 + strided], tap_weight)
    out = out.reshape(x.shape[0], channels_out, *out_size)
    if transposed:
        inner = tuple(slice(padding[d], out_size[d] - padding[d]) for d in range(dims))
        out = out[(slice(None),) * 2 + inner]
    return out + bias.reshape(1, -1, *[1] * dims)


#: The vendor's bfloat16 convolution rounds more on processors without AVX-512.
TOLERANCE = {**oracle.TOLERANCE, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("text", ["qint8/channel=0/symmetric/float32", "qint4/group=5/affine/float16",
                                  "qint3/group=8/shift/float32", "qfloat8_e4m3fn/tensor/symmetric/float32"])  # fmt: skip
def test_conv(case: tuple[int, bool, int, int, int, int, int], text: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, q, bias, arguments = _case(case, text, dtype)
        got = conv(x, q.data, q.scale, q.zero, bias, text, *arguments)
        want = _direct(oracle.wide(x), oracle.value(q), oracle.wide(bias), arguments)
        assert got.dtype == dtype and oracle.relative(got, want) < TOLERANCE[dtype]
        no_bias = conv(x, q.data, q.scale, q.zero, None, text, *arguments)
        assert oracle.relative(no_bias, want - _shaped(bias, want)) < TOLERANCE[dtype]


def _shaped(bias: torch.Tensor, like: oracle.Array) -> oracle.Array:
    return oracle.wide(bias).reshape(1, -1, *[1] * (like.ndim - 2))


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: tuple[int, bool, int, int, int, int, int]) -> None:
    text = "qint4/group=5/affine/float16"
    x, q, bias, arguments = _case(case, text)
    oracle.opcheck(conv, (x, q.data, q.scale, q.zero, bias, text, *arguments))
    oracle.opcheck(conv, (x.requires_grad_(), q.data, q.scale, q.zero, bias.requires_grad_(), text, *arguments))
    oracle.opcheck(conv, (x, q.data, q.scale, q.zero, None, text, *arguments))


@pytest.mark.parametrize("case", [c for c in CASES if c[0] == 2])
def test_channels_last(case: tuple[int, bool, int, int, int, int, int]) -> None:
    text = "qint8/channel=0/symmetric/float32"
    x, q, bias, arguments = _case(case, text)
    x = x.contiguous(memory_format=torch.channels_last)
    oracle.opcheck(conv, (x, q.data, q.scale, q.zero, bias, text, *arguments))
    want = _direct(oracle.wide(x), oracle.value(q), oracle.wide(bias), arguments)
    assert oracle.relative(conv(x, q.data, q.scale, q.zero, bias, text, *arguments), want) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: tuple[int, bool, int, int, int, int, int]) -> None:
    text = "qint4/group=5/affine/float16"
    x, q, bias, arguments = _case(case, text, torch.float64)
    shape, transposed, groups = arguments[0], arguments[4], arguments[6]
    weight = weight_of(torch.from_numpy(oracle.value(q)), shape, transposed, groups)
    x.requires_grad_()
    bias.requires_grad_()
    got = conv(x, q.data, q.scale, q.zero, bias, text, *arguments)
    want = torch.ops.aten.convolution(x, weight, bias, *arguments[1:])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, [x, bias], grad), torch.autograd.grad(want, [x, bias], grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_samples() -> None:
    text = "qint8/channel=0/symmetric/float32"
    x, q, bias, arguments = _case(CASES[3], text, batch=0)
    assert conv(x, q.data, q.scale, q.zero, bias, text, *arguments).shape == (0, 12, 9, 9)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_of_and_weight_of_are_inverse(transposed: bool, groups: int) -> None:
    shape = [8, 12 // groups, 3, 2] if transposed else [12, 8 // groups, 3, 2]
    weight = oracle.data(*shape)
    rows = rows_of(weight, transposed, groups)
    assert tuple(rows.shape) == matrix_shape(shape, transposed, groups) == (12, 8 // groups * 6)
    assert torch.equal(weight_of(rows, shape, transposed, groups), weight)


def test_wrong_input() -> None:
    text = "qint8/channel=0/symmetric/float32"
    x, q, bias, arguments = _case(CASES[3], text)
    with pytest.raises(ValueError, match="has data of shape"):
        conv(x, q.data[:-1], q.scale, None, bias, text, *arguments)
    with pytest.raises(RuntimeError, match="channels"):
        conv(x[:, :4], q.data, q.scale, None, bias, text, *arguments)
