"""``qcompile::attention``: scaled dot product attention with a kernel for few queries over many keys, and one for many.

``softmax(q @ k.T * scale + mask) @ v`` for each head; heads of q share keys and values where k has fewer (grouped
queries). The CPU kernels read keys and values once for all queries that share them, and neither where the mask excludes a
key for every query; the softmax is taken in float32. A query that sees no key gives 0, as in torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.kernels.ops._tiled import FLOATS, define_differentiable

_OP = "qcompile::attention"

_SCHEMA = "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal=False) -> Tensor"

#: The widest head that the CPU kernel takes.
WIDEST_HEAD = 4096


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"{_OP}: {name} must be [batch, heads, positions, head size], got {list(t.shape)}")
        if t.dtype not in FLOATS or t.dtype != q.dtype:
            raise ValueError(f"{_OP}: q, k and v must all be float32, float16 or bfloat16, got {q.dtype} and {t.dtype}")
        if t.shape[3] < 1 or t.shape[3] > WIDEST_HEAD:
            raise ValueError(f"{_OP}: head sizes must be in 1..{WIDEST_HEAD}, {name} has {t.shape[3]}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"{_OP}: k must have the batch and head size of q {list(q.shape)}, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{_OP}: v must have the batch, heads and positions of k {list(k.shape)}, got {list(v.shape)}")
    if q.shape[1] != 0 if k.shape[1] == 0 else q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{_OP}: the heads of q must be a multiple of those of k, got {q.shape[1]} and {k.shape[1]}")
    if mask is None:
        return
    if is_causal:
        raise ValueError(f"{_OP}: mask and is_causal exclude each other: give one")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise ValueError(f"{_OP}: mask must be bool, float32 or {q.dtype} like q, got {mask.dtype}")
    full = (*q.shape[:3], k.shape[2])
    fits = mask.dim() <= 4 and all(a in (1, b) for a, b in zip(mask.shape[::-1], full[::-1], strict=False))
    if not fits:
        raise ValueError(f"{_OP}: mask must broadcast to {list(full)}, got {list(mask.shape)}")


def _result(q: Tensor, v: Tensor) -> Tensor:
    """Empty, in memory ``[batch, queries, heads, head size]``: merging the heads, which comes next, moves nothing."""
    return q.new_empty([q.shape[0], q.shape[2], q.shape[1], v.shape[3]]).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False) -> Tensor:
    _check(q, k, v, mask, is_causal)
    return _result(q, v)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False) -> Tensor:
    """The reference, in plain torch; raises ValueError on a mismatch.

    Args:
        q: ``[batch, heads, queries, head size]``, float32, float16 or bfloat16.
        k: ``[batch, groups, keys, head size]``, its dtype that of q; groups divide heads.
        v: ``[batch, groups, keys, value size]``, its dtype that of q.
        mask: broadcasts to ``[batch, heads, queries, keys]``; bool (True: seen), or float (added to the score), float32 or
            of the dtype of q. None: every query sees every key.
        scale: factor of ``q @ k.T``.
        is_causal: query i sees keys 0 .. i; excludes a mask.

    Returns:
        ``[batch, heads, queries, value size]``, its memory ``[batch, queries, heads, value size]``.
    """
    _check(q, k, v, mask, is_causal)
    result = _result(q, v)
    if k.shape[1] == 0:
        return result
    times = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(times, 1) for t in (k, v))
    bias = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.float()
    y = torch.nn.functional.scaled_dot_product_attention(q.float(), k, v, bias, is_causal=is_causal, scale=scale)
    return result.copy_(y)


def _setup_context(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Nothing is kept."""


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(f"{_OP} has no gradient: it is for inference; train with scaled_dot_product_attention instead")


define_differentiable(_SCHEMA, attention, _fake, _setup_context, _backward, any_strides=True)
