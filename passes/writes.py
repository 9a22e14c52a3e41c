"""Which values operators write to in place: a pass that reads one later than the graph did must know."""

from __future__ import annotations

from torch import fx

from qcompile.passes.program import normalized


def is_mutable(node: fx.Node) -> bool:
    """Whether an operator writes to any of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_written(node: fx.Node) -> bool:
    """Whether an operator writes in place to ``node`` or a view of it."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        for user in current.users:
            schema = getattr(user.target, "_schema", None)
            if schema is None or user in seen:
                continue
            seen.add(user)
            given = normalized(user)
            for argument in schema.arguments:
                if given.get(argument.name) is current and argument.alias_info is not None:
                    if argument.alias_info.is_write:
                        return True
                    stack.append(user)
    return False
