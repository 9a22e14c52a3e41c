"""Which values operators write to in place: a pass that reads one later than the graph did must know."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from qcompile.passes.program import normalized


def is_mutable(node: fx.Node) -> bool:
    """Whether an operator writes to any of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def aliased(node: fx.Node) -> Iterator[tuple[object, bool]]:
    """What is given to an operator for each argument whose memory its result may share, and whether it is written to."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return
    given = normalized(node)
    for argument in node.target._schema.arguments:
        if argument.alias_info is not None:
            yield given.get(argument.name), argument.alias_info.is_write


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
