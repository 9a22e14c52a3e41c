from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from qcompile.kernels import QTensor, Scheme

grouped = torch.ops.qcompile.grouped_linear
SCHEMES = [t for t in oracle.SCHEMES if "channel=1" not in t]
ENDS = [[2, 5, 9], [0, 0, 9], [9, 9, 9], [3, 3, 7], [0, 0, 0]]


def _stack(text: str) -> QTensor:
    return QTensor.quantize(oracle.data(3, 7, 33), Scheme.parse(text))


def _by_rows(x: oracle.Array, weight: oracle.Array, ends: list[int]) -> oracle.Array:
    """Row by row, each with the expert whose range it lies in; rows after the last end give zeros."""
    out = np.zeros((len(x), weight.shape[1]))
    start = 0
    for expert, end in enumerate(ends):
        for row in range(start, end):
            out[row] = weight[expert] @ x[row]
        start = end
    return out


@pytest.mark.parametrize("text", SCHEMES)
def test_with_offsets(text: str) -> None:
    q = _stack(text)
    for dtype in (torch.float32, torch.bfloat16):
        x = oracle.data(9, 33, dtype=dtype, seed=1)
        for ends in ENDS:
            args = (x, q.data, q.scale, q.zero, torch.tensor(ends, dtype=torch.int32), text, [3, 7, 33])
            got = grouped(*args)
            assert got.dtype == dtype
            assert oracle.relative(got, _by_rows(oracle.wide(x), oracle.value(q), ends)) < oracle.TOLERANCE[dtype]
    oracle.opcheck(grouped, args)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_batch_for_each(text: str, rows: int) -> None:
    q = _stack(text)
    for dtype in (torch.float32, torch.bfloat16):
        x = oracle.data(3, rows, 33, dtype=dtype, seed=1)
        args = (x, q.data, q.scale, q.zero, None, text, [3, 7, 33])
        want = np.einsum("emk,enk->emn", oracle.wide(x), oracle.value(q))
        assert oracle.relative(grouped(*args), want) < oracle.TOLERANCE[dtype]
    oracle.opcheck(grouped, args)


def test_no_rows_at_all() -> None:
    q = _stack("qint4/group=16/affine/float16")
    args = (torch.ones(0, 33), q.data, q.scale, q.zero, torch.zeros(3, dtype=torch.int32), str(q.scheme), [3, 7, 33])
    oracle.opcheck(grouped, args)
    assert grouped(*args).shape == (0, 7)


@pytest.mark.parametrize("ends", [None, [2, 5, 9], [0, 4, 6]])
def test_gradients(ends: list[int] | None) -> None:
    q = _stack("qint4/group=16/affine/float16")
    weight = torch.from_numpy(oracle.value(q))
    x = oracle.data(*((3, 4) if ends is None else (9,)), 33, dtype=torch.float64, seed=1).requires_grad_()
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    got = grouped(x, q.data, q.scale, q.zero, offsets, str(q.scheme), [3, 7, 33])
    if ends is None:
        want = torch.einsum("emk,enk->emn", x, weight)
    else:
        bounds = [0, *ends]
        parts = [x[bounds[e] : bounds[e + 1]] @ weight[e].t() for e in range(3)]
        want = torch.cat([*parts, x.new_zeros(len(x) - ends[-1], 7)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(want)
    (a,), (b,) = torch.autograd.grad(got, [x], grad), torch.autograd.grad(want, [x], grad)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    oracle.opcheck(grouped, (x, q.data, q.scale, q.zero, offsets, str(q.scheme), [3, 7, 33]))


@pytest.mark.parametrize("x_shape", [(3, 4, 33), (9, 33)])
def test_other_memory_orders(x_shape: tuple[int, ...]) -> None:
    q = _stack("qint8/group=16/affine/float16")
    x = oracle.data(*x_shape).transpose(-1, -2).contiguous().transpose(-1, -2)
    offsets = None if len(x_shape) == 3 else torch.tensor([1, 1, 8], dtype=torch.int32)
    oracle.opcheck(grouped, (x, q.data, q.scale, q.zero, offsets, str(q.scheme), [3, 7, 33]))


def test_wrong_input() -> None:
    q = _stack("qint4/group=16/affine/float16")
    rest = (str(q.scheme), [3, 7, 33])
    ends = torch.tensor([2, 5, 9], dtype=torch.int32)
    for x, offsets in [
        (torch.ones(9, 33), None), (torch.ones(2, 4, 33), None), (torch.ones(3, 4, 32), None),
        (torch.ones(3, 4, 33), ends), (torch.ones(9, 32), ends), (torch.ones(9, 33), ends[:2]),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=r"does not fit weights of shape \[3, 7, 33\]"):
            grouped(x, q.data, q.scale, q.zero, offsets, *rest)
    with pytest.raises(ValueError, match=r"has shape \[E, N, K\]"):
        grouped(torch.ones(9, 33), q.data, q.scale, q.zero, ends, str(q.scheme), [21, 33])
    with pytest.raises(TypeError, match="offsets must be"):
        grouped(torch.ones(9, 33), q.data, q.scale, q.zero, ends.float(), *rest)
