"""Attention of few and of many queries: the kernels of each instruction set, and the reference, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.kernels.ops.attention import attention as reference

op = torch.ops.qcompile.attention
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
FLOATS = tuple(TOLERANCE)


def tensors(
    heads: int, groups: int, queries: int, keys: int, size: int, dtype: torch.dtype = torch.float32, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, h, s, size) for h, s in ((heads, queries), (groups, keys), (groups, keys)))
    k[:, :, keys // 2] *= 20  # an outlier, which the softmax must get right
    v[:, :, :, size // 2] *= 50
    return q.to(dtype), k.to(dtype), v.to(dtype)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    times = q.shape[1] // max(k.shape[1], 1)
    k, v = (t.double().repeat_interleave(times, 1) for t in (k, v))
    scores = q.double() @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    none = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(none, 0) @ v


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None, causal: bool = False) -> None:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    want = exact(q, k, v, mask, scale, causal)
    for function in (op, reference):
        got = function(q, k, v, mask, scale, causal)
        assert got.shape == want.shape
        assert got.dtype == q.dtype
        assert got.transpose(1, 2).is_contiguous()
        assert (got.double() - want).norm() <= TOLERANCE[q.dtype] * want.norm()


def masks(heads: int, queries: int, keys: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    seen = torch.arange(keys) <= torch.arange(keys // 3, keys // 3 + queries)[:, None]
    hidden = torch.full((queries, keys), -torch.inf)
    return {
        "none": None,
        "causal": seen[None, None],
        "expanded": seen[None, None].expand(2, heads, queries, keys),
        "random": torch.rand(2, 1, queries, keys) < 0.4,
        "padded on the left": (torch.arange(keys) >= torch.tensor([keys // 4, keys - 1])[:, None])[:, None, None],
        "of a head": torch.rand(heads, 1, keys) < 0.4,
        "one position for all": torch.rand(2, 1, queries, 1) < 0.5,
        "every second": torch.rand(1, 1, queries, 2 * keys)[..., ::2] < 0.5,
        "float": torch.where(seen, torch.randn(queries, keys), hidden).to(dtype),
        "float32": torch.where(seen, torch.zeros(()), hidden),
        "least number": torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None],
        "nothing seen": torch.zeros(1, 1, queries, keys, dtype=torch.bool),
        "no axes": torch.tensor(True),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("keys", [1, 7, 64, 97, 640])
def test_masks(isa: str, keys: int, dtype: torch.dtype) -> None:
    for heads, groups, queries in ((9, 3, 1), (4, 4, 3), (6, 2, 16)):
        q, k, v = tensors(heads, groups, queries, keys, 64, dtype)
        for mask in masks(heads, queries, keys, dtype).values():
            check(q, k, v, mask)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("keys", [1, 7, 64, 97, 193])
def test_masks_of_many_queries(isa: str, keys: int, dtype: torch.dtype) -> None:
    for heads, groups, queries in ((6, 2, 17), (2, 2, 97), (3, 1, 160)):
        q, k, v = tensors(heads, groups, queries, keys, 40, dtype)
        check(q, k, v, None, causal=True)
        for mask in masks(heads, queries, keys, dtype).values():
            check(q, k, v, mask)


def test_causal(isa: str) -> None:
    for queries, keys in ((1, 7), (3, 97), (16, 1), (64, 64), (97, 193), (193, 97), (320, 320)):
        check(*tensors(6, 3, queries, keys, 16), None, causal=True)


@pytest.mark.parametrize("size", [1, 7, 16, 40, 64, 80, 96, 97, 160, 256, 300])
def test_head_sizes(isa: str, size: int) -> None:
    for dtype in FLOATS:
        q, k, v = tensors(6, 2, 2, 97, size, dtype)
        check(q, k, v, torch.rand(2, 1, 2, 97) < 0.7, 0.3)
        check(q, k, v[..., : size // 2 + 1], None)
        q, k, v = tensors(4, 2, 37, 97, size, dtype)
        check(q, k, v, torch.rand(2, 1, 37, 97) < 0.7, 0.3)
        check(q, k[..., :60, :], v[..., :60, : size // 2 + 1], None)


@pytest.mark.parametrize("queries", range(1, 18))
def test_queries(isa: str, queries: int) -> None:
    for heads, groups in ((1, 1), (7, 7), (5, 1), (20, 2)):
        check(*tensors(heads, groups, queries, 97, 16), torch.rand(2, 1, queries, 97) < 0.5)


@pytest.mark.parametrize("queries", [3, 33])
def test_not_contiguous(isa: str, queries: int) -> None:
    q, k, v = tensors(6, 2, queries, 97, 64)
    mask = torch.rand(97, queries, 1, 2).permute(3, 2, 1, 0) < 0.5
    check(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mask)
    both = torch.randn(2, 97, 2, 2, 64)  # keys and values side by side, positions before heads
    check(q, both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2), mask)
    cache = torch.randn(2, 2, 200, 64)
    check(q, cache[:, :, 3:100], cache[:, :, 100:197], mask)
    check(q, k.mT.contiguous().mT, v.mT.contiguous().mT, mask)  # the last axis is not the one that is contiguous
    check(q[:, :1].expand(-1, 6, -1, -1), k[:1].expand(2, -1, -1, -1), v[:, :, :1].expand(-1, -1, 97, -1), mask)
    check(torch.randn(2, 6, queries, 65)[..., 1:], k, v, mask)


@pytest.mark.parametrize("queries", [3, 33])
@pytest.mark.parametrize("dtype", FLOATS)
def test_empty(isa: str, dtype: torch.dtype, queries: int) -> None:
    mask = torch.ones(1, 1, queries, 20, dtype=torch.bool)
    some, none = (2, 0, queries, 16), (2, 4, 0, 16)
    for shapes in (((0, 4, queries, 16), (0, 2, 20, 16)), (none, (2, 2, 20, 16)), (some, (2, 0, 20, 16))):
        q, k = (torch.randn(s).to(dtype) for s in shapes)
        for function in (op, reference):
            assert function(q, k, k, None, 0.5).shape == q.shape
            assert function(q, k, k, None, 0.5, True).shape == q.shape
            if q.shape[2]:
                assert function(q, k, k, mask, 0.5).shape == q.shape
    q, k, v = tensors(4, 2, queries, 1, 16, dtype)
    for function in (op, reference):
        assert torch.equal(function(q, k[:, :, :0], v[:, :, :0], None, 0.5), torch.zeros_like(q))


@pytest.mark.parametrize("queries", [2, 34])
def test_keys_that_nobody_sees_are_not_read(isa: str, queries: int) -> None:
    q, k, v = tensors(6, 2, queries, 640, 64)
    mask = torch.zeros(queries, 640, dtype=torch.bool)
    mask[::2, 70:300] = True
    mask[1::2, 100:301] = True
    want = op(q, k, v, mask, 0.125)
    for t in (k, v):
        t[:, :, :70] = torch.nan
        t[:, :, 301:] = torch.inf
    assert torch.equal(op(q, k, v, mask, 0.125), want)


@pytest.mark.parametrize("queries", [2, 34])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(isa: str, bad: float, queries: int) -> None:
    for which in range(3):
        args = tensors(6, 2, queries, 640, 64)
        args[which][1, 0, 1, 5] = bad
        got, want = op(*args, None, 0.125), exact(*args, None, 0.125)
        assert torch.equal(got.isfinite(), want.isfinite())
        assert not got.isfinite().all()
    got = op(*tensors(6, 2, queries, 640, 64), torch.full((1, 1), torch.nan), 0.125)
    assert got.isnan().all()


def test_same_for_any_number_of_threads(isa: str) -> None:
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            for heads, groups, keys in ((9, 3, 640), (1, 1, 1300), (12, 4, 70)):
                check(*tensors(heads, groups, 2, keys, 64, batch=1), torch.rand(1, 1, 2, keys) < 0.7)
                check(*tensors(heads, groups, 2, keys, 64, batch=1), torch.arange(keys)[None] >= keys - 3)
    finally:
        torch.set_num_threads(threads)


def test_many_queries_on_any_number_of_threads(isa: str) -> None:
    threads = torch.get_num_threads()
    try:
        args = tensors(9, 3, 100, 193, 16)
        mask = torch.rand(2, 1, 100, 193) < 0.7
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            check(*args, mask)
            check(*args, None, causal=True)
    finally:
        torch.set_num_threads(threads)


def test_traced(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = tensors(6, 2, 2, 37, 16, dtype)
        for mask in (None, torch.rand(1, 1, 2, 37) < 0.5, torch.randn(2, 37)):
            for one in (op, torch.ops.qcompile.attention_forward):
                torch.library.opcheck(one, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mask, 0.25))
        torch.library.opcheck(op, (q, k, v, None, 0.25, True))


def test_no_gradient(isa: str) -> None:
    q, k, v = tensors(6, 2, 2, 37, 16)
    y = op(q.requires_grad_(), k, v, None, 0.25)
    with pytest.raises(RuntimeError, match="has no gradient: it is for inference"):
        y.sum().backward()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "three axes": ({"q": torch.randn(6, 2, 16)}, r"must be \[batch, heads, positions, head size\], got \[6, 2, 16\]"),
    "an integer": ({"q": torch.ones(2, 6, 2, 16, dtype=torch.int32)}, "must (all )?be float32, float16 or bfloat16"),
    "another dtype": ({"v": torch.randn(2, 2, 37, 16).bfloat16()}, "dtype of q|all be float32"),
    "another batch": ({"k": torch.randn(1, 2, 37, 16)}, "k must"),
    "another size": ({"k": torch.randn(2, 2, 37, 8)}, "k must"),
    "other values": ({"v": torch.randn(2, 2, 36, 16)}, "v must"),
    "heads": ({"k": torch.randn(2, 4, 37, 16), "v": torch.randn(2, 4, 37, 16)}, "must be a multiple of those of k"),
    "a wide head": ({"v": torch.randn(2, 2, 37, 4097)}, r"must be in 1\.\.4096"),
    "the mask's shape": ({"mask": torch.ones(2, 36, dtype=torch.bool)}, r"must broadcast to \[2, 6, 2, 37\], got \[2, 36\]"),
    "the mask's axes": ({"mask": torch.ones(1, 1, 1, 2, 37, dtype=torch.bool)}, "must broadcast to"),
    "two masks": ({"mask": torch.ones(2, 37, dtype=torch.bool), "is_causal": True}, "exclude each other: give one"),
    "the mask's dtype": ({"mask": torch.ones(2, 37, dtype=torch.float16)}, "mask must be bool, float32 or"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(isa: str, name: str) -> None:
    changed, message = WRONG[name]
    q, k, v = tensors(6, 2, 2, 37, 16)
    arguments = {"q": q, "k": k, "v": v, "mask": None, "scale": 0.25, **changed}
    with pytest.raises(RuntimeError, match=message):
        op(**arguments)
    with pytest.raises(ValueError, match=message):
        reference(**arguments)
