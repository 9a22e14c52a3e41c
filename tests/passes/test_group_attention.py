"""Repeated keys and values are read in place, and only where that gives the same result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import Calls
from torch import Tensor, nn

from qcompile.capture_export import from_exported, to_exported
from qcompile.passes.group_attention import GroupAttention

attention = nn.functional.scaled_dot_product_attention


def inputs(m: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, s, 16, generator=g, dtype=dtype) for h, s in ((6, m), (2, 37), (2, 37)))
    k[:, :, 5] *= 20  # an outlier, which the softmax must get right
    return q, k, v, torch.rand(2, 1, m, 37, generator=g) < 0.7


def repeat(t: Tensor, times: int = 3) -> Tensor:
    b, g, s, d = t.shape
    return t[:, :, None].expand(b, g, times, s, d).reshape(b, g * times, s, d)


def rewritten(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[int, Tensor, Tensor, str]:
    """How often the pass matched, the float result, the rewritten one, and the graph's code."""
    want = function(*(a.clone() for a in args))
    ep = torch.export.export(Calls(function), tuple(a.clone() for a in args))
    program = from_exported(ep)
    count = GroupAttention().run(program)
    program.recompile()
    return count, want, to_exported(program, ep).module()(*(a.clone() for a in args)), program.module.code


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "expand": lambda q, k, v, mask: attention(q, repeat(k), repeat(v), mask, scale=0.3),
    "repeat_interleave": lambda q, k, v, mask: attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), mask),
    "no mask": lambda q, k, v, mask: attention(q, repeat(k), repeat(v)),
    "shared": lambda q, k, v, mask: attention(q, repeat(k), repeat(v), mask) + attention(2 * q, repeat(k), repeat(v)),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("m", [1, 7])
def test_fires_and_gives_the_same(name: str, m: int) -> None:
    args = inputs(m)
    count, want, got, code = rewritten(SPELLINGS[name], args)
    assert count == (2 if name == "shared" else 1)
    assert "enable_gqa = True" in code
    assert "expand" not in code
    assert "repeat_interleave" not in code
    exact = SPELLINGS[name](*(a.double() if a.is_floating_point() else a for a in args))
    assert (got - exact).norm() <= max(2e-6 * exact.norm(), 1.5 * (want - exact).norm())


def test_fires_after_the_cache_is_written() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k = k.index_copy_(2, torch.tensor([3]), k[:, :, :1] * 2)
        return attention(q, repeat(k), repeat(v), mask)

    count, want, got, _ = rewritten(step, inputs())
    assert count == 1
    torch.testing.assert_close(got, want)


def written_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    kk, vv = repeat(k), repeat(v)
    k.mul_(0)
    return attention(q, kk, vv, mask) + k.sum()


NOT: dict[str, Callable[..., Tensor]] = {
    "written in between": written_between,
    "tiled, not repeated": lambda q, k, v, mask: attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), mask),
    "heads in another order": lambda q, k, v, mask: attention(
        q, k[:, None].expand(2, 3, 2, 37, 16).reshape(2, 6, 37, 16), repeat(v), mask
    ),
    "keys not repeated": lambda q, k, v, mask: attention(q[:, :2], k, v, mask),
    "only values repeated": lambda q, k, v, mask: attention(q, torch.cat([k, k, k], 1), v.repeat_interleave(3, 1), mask),
    "along the sequence": lambda q, k, v, mask: attention(q[:, :2], k.repeat_interleave(3, 2), v.repeat_interleave(3, 2)),
}


@pytest.mark.parametrize("name", NOT)
def test_does_not_fire(name: str) -> None:
    count, want, got, code = rewritten(NOT[name], inputs())
    assert count == 0
    assert "enable_gqa" not in code
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_does_not_fire_on_another_device() -> None:
    with torch.device("meta"):
        args = tuple(torch.empty_like(a) for a in inputs())
    args = tuple(a.to("meta") for a in args)
    program = from_exported(torch.export.export(Calls(SPELLINGS["expand"]), args))
    assert GroupAttention().run(program) == 0
