"""Attention whose heads share keys and values reads them once, instead of a copy for each head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.passes.base import Pass
from qcompile.passes.program import Program, normalized, static_shape
from qcompile.passes.rewrite import Bindings, Rule, rewrite

aten = torch.ops.aten

_Repeat = Callable[[Any, Any, Any], Any]

#: How a tensor ``[b, g, s, d]`` is repeated along its heads; the last two arguments bind whatever the spelling needs.
REPEATS: tuple[tuple[str, _Repeat], ...] = (
    ("expand", lambda t, five, four: aten.reshape.default(aten.expand.default(aten.unsqueeze.default(t, 2), five), four)),
    ("repeat-interleave", lambda t, times, axis: aten.repeat_interleave.self_int(t, times, axis)),
)  # fmt: skip


def _grouped(program: Program, node: fx.Node, b: Bindings) -> bool:
    q, k, v = (static_shape(b[name]) for name in ("q", "k", "v"))
    if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
        return False
    if node.meta["val"].device.type != "cpu" or k[1] != v[1] or q[1] % k[1]:
        return False
    times = q[1] // k[1]
    repeats = [_times(b[f"{t}1"], b[f"{t}2"], shape) for t, shape in (("k", k), ("v", v))]
    return repeats == [times, times] and not _written_between(node)


def _times(first: Any, second: Any, shape: tuple[int, ...]) -> int | None:
    """How often a matched repeat copies each head of a tensor of ``shape``; None where it does something else."""
    if isinstance(first, int):
        return first if second in (1, -3) else None
    if len(first) != 5 or not isinstance(first[2], int):
        return None
    kept = [a in (-1, s) for a, s in zip((*first[:2], *first[3:]), shape, strict=True)]
    rows = (shape[0], shape[1] * first[2], *shape[2:])
    flat = len(second) == 4 and [a in (-1, s) for a, s in zip(second, rows, strict=True)]
    return first[2] if all(kept) and flat and all(flat) else None


def _written_between(node: fx.Node) -> bool:
    """Whether something is written between the copies that ``node`` reads and ``node``: it would now be seen by it."""
    arguments = normalized(node)
    copies = {arguments["key"], arguments["value"]}
    step = node.prev
    while copies and step.op != "root":
        copies.discard(step)
        schema = getattr(step.target, "_schema", None)
        if copies and schema is not None and schema.is_mutable:
            return True
        step = step.prev
    return False


def _rule(name: str, repeat: _Repeat) -> Rule:
    return Rule(
        f"grouped-{name}",
        lambda q, k, k1, k2, v, v1, v2, mask, dropout, causal, scale: aten.scaled_dot_product_attention.default(
            q, repeat(k, k1, k2), repeat(v, v1, v2), mask, dropout, causal, scale=scale
        ),
        lambda q, k, v, mask, dropout, causal, scale: aten.scaled_dot_product_attention.default(
            q, k, v, mask, dropout, causal, scale=scale, enable_gqa=True
        ),
        where=_grouped,
        shared=(aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.repeat_interleave.self_int),
    )


def _rules() -> Iterator[Rule]:
    for name, repeat in REPEATS:
        yield _rule(name, repeat)


RULES = tuple(_rules())


@dataclass(frozen=True)
class GroupAttention(Pass):
    """Let attention over shared keys and values (grouped-query attention) read them where they are::

        k ─► unsqueeze ─► expand ─► reshape ─┐
        v ─► unsqueeze ─► expand ─► reshape ─┴► attention(q, k, v)   ->   attention(q, k, v, enable_gqa=True)

    With a static cache the copies are made of the whole cache at each token, and cost more than attention itself. Only
    on the CPU, whose kernel takes groups; elsewhere a mask and groups together fall back to a slower one.

    Before: any program. After: the same results; the copies are gone where nothing else reads them.
    """

    def run(self, program: Program) -> int:
        """Rewrite; returns how many attentions were changed."""
        return sum(rewrite(program, RULES).values())
