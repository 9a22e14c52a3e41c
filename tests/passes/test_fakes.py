"""Fake results are computed once for each kind of call, and are what computing each anew gives."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompile.passes.fakes import FakeValues, UnlikeError, fake_of, key_of

aten = torch.ops.aten


def _fake(mode: FakeTensorMode, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with mode:
        return torch.empty(*shape, dtype=dtype)


@pytest.mark.parametrize("offset", [0, 1])
def test_calls_of_one_kind_share_a_result(offset):
    mode = FakeTensorMode()
    values = FakeValues(mode)
    with mode:
        a, b = (torch.empty(60)[offset:].as_strided((3, 7), (8, 1)) for _ in range(2))
    first = values(aten.add.Tensor, (a, 1.0), {})
    assert values(aten.add.Tensor, (b, 1.0), {}) is first
    want = torch.empty(60)[offset:].as_strided((3, 7), (8, 1)) + 1.0
    assert (first.shape, first.stride(), first.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((3, 7), (7, 3)),
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ([1, 2], (1, 2)),
        (torch.float32, torch.float64),
        (slice(1), slice(None, 1, 1)),
    ],
)
def test_arguments_that_differ_have_another_key(one, other):
    mode = FakeTensorMode()
    if isinstance(one, tuple):
        one, other = _fake(mode, *one), _fake(mode, *other)
    assert key_of(one, mode, {}) != key_of(other, mode, {})


def test_tensors_differ_by_dtype_strides_and_who_is_who():
    mode = FakeTensorMode()
    a, b = _fake(mode, 4, 4), _fake(mode, 4, 4)
    assert key_of([a, b], mode, {}) == key_of([b, a], mode, {})
    assert key_of([a, a], mode, {}) != key_of([a, b], mode, {})
    assert key_of(a, mode, {}) != key_of(_fake(mode, 4, 4, dtype=torch.float16), mode, {})
    with mode:
        assert key_of(a, mode, {}) != key_of(a.t(), mode, {})


def test_operators_that_write_and_symbols_are_computed_each_time():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    values = FakeValues(mode)
    a = _fake(mode, 3, 3)
    assert values(aten.add_.Tensor, (a, 1.0), {}) is a
    x = mode.from_tensor(torch.empty(5, 3), symbolic_context=None, static_shapes=False)
    assert isinstance(x.shape[0], torch.SymInt)
    assert values(aten.neg.default, (x,), {}) is not values(aten.neg.default, (x,), {})
    with pytest.raises(UnlikeError):
        key_of(torch.empty(3), mode, {})
    with pytest.raises(UnlikeError):
        key_of(object(), mode, {})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, 7),
        torch.empty(7, 3, dtype=torch.float16).t(),
        torch.empty(2, 5, 4, dtype=torch.uint8)[:, 1:, ::2],
        torch.empty((), dtype=torch.bfloat16),
        torch.empty(0, 4),
        torch.nn.Parameter(torch.empty(3, 7)),
        torch.empty(3, dtype=torch.complex64).conj(),
        torch.empty(4, 2).to_sparse(),
    ],
    ids=["plain", "transposed", "part", "scalar", "empty", "parameter", "conjugate", "sparse"],
)
def test_a_fake_is_the_one_that_torch_makes(tensor):
    mode, other = FakeTensorMode(), FakeTensorMode()
    made, want = fake_of(tensor, mode), other.from_tensor(tensor, static_shapes=True)
    assert made.fake_mode is mode
    for what in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf"):
        assert getattr(made, what) == getattr(want, what), what
    assert (made.is_conj(), made.is_inference(), type(made)) == (want.is_conj(), want.is_inference(), type(want))
    if tensor.layout is torch.strided:
        assert (made.stride(), made.storage_offset()) == (want.stride(), want.storage_offset())
