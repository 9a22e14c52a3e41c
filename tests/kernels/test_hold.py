"""Tensors in a box: programs read and write the tensors themselves, until they are let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracle import data
from torch import Tensor

from qcompile.kernels.cpu import build
from qcompile.kernels.ops import sequence as ops
from qcompile.kernels.ops.hold import hold, in_box, let_go
from qcompile.kernels.ops.sequence import Kind, Writer

OPS = torch.ops.qcompile
RUNS = [OPS.sequence_writing, ops.sequence_writing]


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    build.ensure_loaded()


def program(tensors: Sequence[Tensor], x: Tensor, written: int = 1) -> str:
    """Adds x to the last of the tensors, in a row that the first names, and gives their product."""
    writer = Writer(written, [Kind(torch.int64, (1,), (1,)), Kind.of(x)])
    at, cache = writer.held(0, 0, Kind.of(tensors[0])), writer.held(0, len(tensors) - 1, Kind.of(tensors[-1]))
    row = writer.view(cache, 0, Kind(x.dtype, tuple(x.shape), (tensors[-1].stride(0), 1)))
    product = writer.step("mul", [1, row], [Kind.of(x)])[0]
    writer.step("index_copy_", [cache, 0, at, 1], [])
    writer.step("add_", [at, 1.0], [])
    return writer.text([(product, Kind.of(x))])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_writes_to_what_a_box_holds(run: Callable[..., Any], dtype: torch.dtype) -> None:
    at, cache, x = torch.tensor([2]), data(7, 97).to(dtype), data(1, 97, seed=1).to(dtype)
    box, text, want = hold([at, torch.zeros(3), cache]), program([at, torch.zeros(3), cache], x), cache.clone()
    assert in_box(box)[2] is cache
    for step in range(2):
        out = torch.empty_like(x)
        run([box, out], [x], text)
        want[2 + step] = x
        assert torch.equal(out, x * want[:1]) and torch.equal(cache, want) and at.item() == 3 + step
    # What somebody else writes is seen, and where a tensor gets other memory, that is.
    cache.data = data(7, 97, seed=2).to(dtype)
    want = cache.clone()
    want[4] = x
    run([box, out], [x], text)
    assert torch.equal(out, x * want[:1]) and torch.equal(cache, want)


@pytest.mark.parametrize("run", RUNS)
def test_what_is_wrong_is_said(run: Callable[..., Any]) -> None:
    at, cache, x = torch.tensor([2]), data(7, 97), data(1, 97, seed=1)
    text, out, before = program([at, cache], x), torch.empty_like(x), cache.clone()
    for held, said in (([at], "none at|no value"), ([at, cache.double()], "says"), ([at, cache[:, :7]], "says")):
        box = hold(held)
        with pytest.raises((RuntimeError, ValueError), match=said):
            run([box, out], [x], text)
    box = hold([at, cache])
    let_go([cache])
    with pytest.raises((RuntimeError, ValueError), match="let go"):
        run([box, out], [x], text)
    with pytest.raises((RuntimeError, ValueError), match="let go"):
        run([torch.tensor([1 << 60]), out], [x], text)
    assert torch.equal(cache, before) and at.item() == 2


def test_a_box_that_is_only_read_is_not_written_to() -> None:
    at, cache, x = torch.tensor([2]), data(7, 97), data(1, 97, seed=1)
    box, text = hold([at, cache]), program([at, cache], x, written=0)
    with pytest.raises(RuntimeError, match="only read"):
        OPS.sequence([box, x], text)
    strided = torch.empty(97, 7).t()
    with pytest.raises(RuntimeError, match="strides"):
        OPS.sequence_writing([hold([at, strided]), torch.empty_like(x)], [x], program([at, cache], x))


def test_a_result_is_never_held() -> None:
    x = data(3, 7)
    writer = Writer(0, [Kind(torch.int64, (1,), (1,)), Kind.of(x)])
    text = writer.text([(writer.held(0, 0, Kind.of(x)), Kind.of(x))])
    box = hold([x])
    with pytest.raises(RuntimeError, match="held"):
        OPS.sequence([box, x], text)
    with pytest.raises(ValueError, match="result"):
        ops.sequence([box, x], text)
    bytes_only = Writer(0, [Kind(torch.uint8, (1,), (1,))])
    text = bytes_only.text([(bytes_only.step("neg", [bytes_only.held(0, 0, Kind.of(x))], [Kind.of(x)])[0], Kind.of(x))])
    with pytest.raises(RuntimeError, match="box"):
        OPS.sequence([torch.zeros(1, dtype=torch.uint8)], text)


def test_tensors_are_held_as_long_as_their_box() -> None:
    cache = torch.zeros(5)
    gone = weakref.ref(cache)
    box = hold([cache])
    del cache
    gc.collect()
    assert in_box(box)[0] is gone()
    del box
    gc.collect()
    assert gone() is None
    cache = torch.zeros(5)
    gone, box = weakref.ref(cache), hold([cache])
    let_go([cache])
    del cache
    gc.collect()
    assert gone() is None and box.numel() == 1


def test_a_box_outlives_inference_mode() -> None:
    with torch.inference_mode():
        box = hold([torch.zeros(2)])
    assert not box.is_inference()
