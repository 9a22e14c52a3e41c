"""Which values operators write to in place: a pass that reads one later than the graph did must know."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import fx

from qcompile.passes.program import normalized


def is_mutable(node: fx.Node) -> bool:
    """Whether an operator writes to any of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def aliased(node: fx.Node) -> Iterator[tuple[object, bool]]:
    """What is given to an operator for each argument whose memory its result may share, and whether it is written to."""
    if node.op != "call_function" or not hasattr(node.target, "_schema") or not (shared := _shared(node.target)):
        return
    given = normalized(node)
    for name, written in shared:
        yield given.get(name), written


@functools.cache
def _shared(target: Any) -> tuple[tuple[str, bool], ...]:
    """The arguments of an operator whose memory its result may share, and whether it writes to each."""
    return tuple((a.name, a.alias_info.is_write) for a in target._schema.arguments if a.alias_info is not None)


def is_written(node: fx.Node) -> bool:
    """Whether an operator writes in place to ``node`` or a view of it."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        for user in current.users:
            if user in seen:
                continue
            seen.add(user)
            for given, written in aliased(user):
                if given is current:
                    if written:
                        return True
                    stack.append(user)
    return False
