"""Attention that the kernels compute becomes their operator, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import export
from small import Calls
from torch import Tensor, nn
from torch.export import Dim

from qcompile.capture_export import from_exported, to_exported
from qcompile.kernels.cpu import build
from qcompile.passes import fuse_attention
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.group_attention import GroupAttention

attention = nn.functional.scaled_dot_product_attention


def inputs(
    m: int = 1, dtype: torch.dtype = torch.float32, heads: int = 6, groups: int = 2, d: int = 16
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, s, d, generator=g).to(dtype) for h, s in ((heads, m), (groups, 37), (groups, 37)))
    k[:, :, 5] *= 20  # an outlier, which the softmax must get right
    return q, k, v, torch.rand(2, 1, m, 37, generator=g) < 0.7


def rewritten(function: Callable[..., Tensor], args: tuple[Tensor, ...], **options: Any) -> tuple[int, Any, str]:
    """How often the pass matched, the rewritten program, and the graph's code."""
    ep = export(Calls(function), *(a.clone() for a in args), **options)
    program = from_exported(ep)
    GroupAttention().run(program)
    count = FuseAttention().run(program)
    program.recompile()
    return count, to_exported(program, ep).module(), program.module.code


def copies(t: Tensor) -> Tensor:
    b, g, s, d = t.shape
    return t[:, :, None].expand(b, g, 3, s, d).reshape(b, g * 3, s, d)


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "grouped": lambda q, k, v, mask: attention(q, k, v, mask, enable_gqa=True),
    "copied heads": lambda q, k, v, mask: attention(q, copies(k), copies(v), mask, scale=0.3),
    "no mask": lambda q, k, v, mask: attention(q, k, v, enable_gqa=True),
    "equal heads": lambda q, k, v, mask: attention(q[:, :2], k, v, mask),
    "expanded mask": lambda q, k, v, mask: attention(q, k, v, mask.expand(2, 6, -1, 37), enable_gqa=True),
    "float mask": lambda q, k, v, mask: attention(q, k, v, torch.where(mask, 0.5, -torch.inf).to(q.dtype), enable_gqa=True),
    "mask of two axes": lambda q, k, v, mask: attention(q, k, v, mask[0, 0], enable_gqa=True),
    "other values": lambda q, k, v, mask: attention(q, k, v[..., :5], mask, scale=1, enable_gqa=True),
    "heads inside": lambda q, k, v, mask: attention(q.mT.contiguous().mT, k, v, mask, enable_gqa=True),
    "causal": lambda q, k, v, mask: attention(q, k, v, is_causal=True, enable_gqa=True),
    "causal, copied heads": lambda q, k, v, mask: attention(q, copies(k), copies(v), None, 0.0, True),
    "merged": lambda q, k, v, mask: attention(q, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 16, 47])
@pytest.mark.parametrize("name", SPELLINGS)
def test_fires_and_gives_the_same(name: str, m: int, dtype: torch.dtype) -> None:
    args, function = inputs(m, dtype), SPELLINGS[name]
    count, module, code = rewritten(function, args)
    assert count == (1 if build.ensure_loaded().loaded else 0)
    assert ("scaled_dot_product_attention" in code) != bool(count)
    got, want = module(*args), function(*args)
    exact = function(*(a.double() if a.is_floating_point() else a for a in args))
    assert got.dtype == want.dtype
    assert (got - exact).norm() <= max(2e-6 * exact.norm(), 1.5 * (want - exact).norm())


def test_fires_after_the_cache_is_written() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k = k.index_copy_(2, torch.tensor([3]), k[:, :, :1] * 2)
        return attention(q, k, v, mask, enable_gqa=True)

    args = inputs()
    count, module, _ = rewritten(step, args)
    assert count == int(build.ensure_loaded().loaded)
    got_args, want_args = ([a.clone() for a in args] for _ in range(2))
    torch.testing.assert_close(module(*got_args), step(*want_args))
    torch.testing.assert_close(got_args[1], want_args[1], rtol=0, atol=0)


def test_the_number_of_keys_may_be_dynamic() -> None:
    keys = {2: Dim("keys")}
    function = SPELLINGS["grouped"]
    args = inputs(2)
    count, module, _ = rewritten(function, args, dynamic_shapes={"args": (None, keys, keys, {3: keys[2]})})
    assert count == int(build.ensure_loaded().loaded)
    q, k, v, mask = args
    shorter = (q, k[:, :, :19].contiguous(), v[:, :, :19].contiguous(), mask[..., :19].contiguous())
    torch.testing.assert_close(module(*shorter), function(*shorter))


NOT: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "dropout": (lambda q, k, v, mask: attention(q, k, v, mask, 0.1, enable_gqa=True), inputs()),
    "wide heads": (SPELLINGS["grouped"], inputs(d=257)),
    "float64": (SPELLINGS["grouped"], inputs(dtype=torch.float64)),
    "no heads": (lambda q, k, v, mask: attention(q[:, 0], k[:, 0], v[:, 0], mask[:, 0]), inputs()),
    "one batch for all": (lambda q, k, v, mask: attention(q[:, :2], k[:1], v[:1], mask), inputs()),
    "one head for all": (lambda q, k, v, mask: attention(q, k[:, :1], v[:, :1], mask), inputs()),
    "a mask that widens": (lambda q, k, v, mask: attention(q[:1], k[:1], v[:1], mask, enable_gqa=True), inputs()),
}


@pytest.mark.parametrize("name", NOT)
def test_does_not_fire(name: str) -> None:
    function, args = NOT[name]
    count, _, code = rewritten(function, args)
    assert count == 0
    assert "qcompile.attention" not in code


@pytest.mark.parametrize("causal", [False, True])
def test_the_number_of_queries_may_be_dynamic(causal: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, v, None if causal else mask, is_causal=causal, enable_gqa=True)

    queries = {2: Dim("queries")}
    args = inputs(7)
    count, module, _ = rewritten(function, args, dynamic_shapes={"args": (queries, None, None, queries)})
    assert count == int(build.ensure_loaded().loaded)
    for m in (2, 40):
        other = inputs(m)
        torch.testing.assert_close(module(*other), function(*other))


def test_does_not_fire_in_training_or_elsewhere_or_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs()
    program = from_exported(export(Calls(SPELLINGS["grouped"]), *args))
    program.inference = False
    assert FuseAttention().run(program) == 0
    program.inference = True
    missing = build.LoadResult(False, None, None, "no compiler")
    monkeypatch.setattr(fuse_attention, "ensure_loaded", lambda: missing)
    assert FuseAttention().run(program) == 0
    monkeypatch.setattr(fuse_attention, "ensure_loaded", lambda: build.LoadResult(True, Path("x"), "portable", "a test"))
    assert FuseAttention().run(program) == 1
    program = from_exported(export(Calls(SPELLINGS["grouped"]), *(a.to("meta") for a in args)))
    assert FuseAttention().run(program) == 0
