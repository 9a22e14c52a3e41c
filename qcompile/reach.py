"""What a function reaches without being given it: tensors that it may read, where they are kept, what a call may change."""

from __future__ import annotations

import enum
import functools
import logging
import operator
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Closed", "Kept", "Link", "Reach", "ReachError"]

#: More than any model has; something that reaches the whole process is no function of its arguments.
MOST_OBJECTS = 1_000_000

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


class Closed:
    """What nobody looks into: no state of it is anything to a call."""


_CLOSED = (
    *_PLAIN, Closed, type, types.ModuleType, types.BuiltinFunctionType, enum.Enum, logging.Logger, threading.local,
    torch.Generator,
)  # fmt: skip


class ReachError(RuntimeError):
    """A function refers to more than can be watched."""


class Link(NamedTuple):
    """Something and where it is kept: ``container[key] is held`` says that it still is."""

    container: Any
    key: Any
    held: Any


class Kept(NamedTuple):
    """A tensor and where it is kept.

    Attributes:
        tensor: the tensor.
        links: from the function to the tensor, what holds what, the tensor first.
        name: the user's name for it: its path in the outermost module, or from the variable that holds it.
        in_module: whether it is a module's parameter or buffer.
    """

    tensor: Tensor
    links: tuple[Link, ...]
    name: str
    in_module: bool


class Reach:
    """All that the objects which a function refers to hold, as it is now.

    Closures, defaults, bound objects, attributes, and what lists, dicts, tuples and sets hold are looked through; globals,
    and attributes in ``__slots__``, are not.

    Args:
        function: a function, method, partial, module or other callable.

    Raises:
        ReachError: it reaches more than ``MOST_OBJECTS`` objects.
    """

    def __init__(self, function: object) -> None:
        #: By the ``id`` of the tensor, the places where it was found.
        self.kept: dict[int, list[Kept]] = {}
        #: By the ``id`` of a module, its path in the outermost module.
        self.paths: dict[int, str] = {}
        self._states: list[tuple[Any, Any, str]] = []
        self._objects: list[object] = []  # alive, so that an id is one object's
        self._walk(function)

    def name_of(self, tensor: Tensor) -> str:
        """The user's name for a tensor."""
        places = self.kept.get(id(tensor))
        return places[0].name if places else "unknown"

    def changed(self, stands_for: Callable[[object, object], bool] = lambda now, before: False) -> list[str]:
        """Where something else is held now: paths, sorted.

        Args:
            stands_for: whether what is held now is only another form of what was held before.
        """

        def equal(now: object, before: object) -> bool:
            return _equal(now, before) or stands_for(now, before)

        return sorted({name for held, before, path in self._states for name in _changed(held, before, path, equal)})

    def restore(self) -> None:
        """Put everything back as it was found."""
        for held, before, _ in self._states:
            if not any(_changed(held, before, "", operator.is_)):
                continue
            held.clear()
            if isinstance(held, MutableSequence):
                held.extend(before)
            else:
                held.update(before)  # a dict, or a set

    def _walk(self, function: object) -> None:
        seen: set[int] = set()
        waiting: list[tuple[object, str, bool, tuple[Link, ...]]] = [(function, "", False, ())]
        while waiting:
            found, path, inside, links = waiting.pop()
            if id(found) in seen or isinstance(found, _CLOSED):
                continue
            seen.add(id(found))
            self._objects.append(found)
            if len(seen) > MOST_OBJECTS:
                raise ReachError(f"it refers to more than {MOST_OBJECTS:,} objects")
            if isinstance(found, nn.Module):
                path = path if inside else ""
                self.paths[id(found)] = path
            parts = list(_parts(found, path, isinstance(found, nn.Module)))
            for container, key, value, name, is_weight in parts:
                if isinstance(value, Tensor):
                    place = Kept(value, (Link(container, key, value), *links), name, is_weight)
                    self.kept.setdefault(id(value), []).append(place)
            # The first is looked through first, all of it: names are found in the order of named_parameters().
            inside = inside or isinstance(found, nn.Module)
            waiting += [
                (v, n, inside, (Link(c, k, v), *links)) for c, k, v, n, _ in reversed(parts) if not isinstance(v, Tensor)
            ]
            self._states += [(held, held.copy(), name) for held, name in _states(found, path)]


def _parts(found: Any, path: str, is_module: bool) -> Iterator[tuple[Any, Any, object, str, bool]]:
    """Container, key, value and name of each thing that an object holds, and whether it is a weight of a module."""
    if isinstance(found, (dict, types.MappingProxyType)):
        yield from ((found, k, v, _join(path, k), False) for k, v in list(found.items()))
        return
    if isinstance(found, (list, tuple, deque)):
        yield from ((found, i, v, _join(path, i), False) for i, v in enumerate(found))
        return
    if isinstance(found, (set, frozenset)):
        yield from ((_Members(found), v, v, path, False) for v in found)
        return
    if isinstance(found, types.MethodType):
        for i, v in enumerate((found.__self__, found.__func__)):
            yield (found.__self__, found.__func__), i, v, path, False
        return
    if isinstance(found, functools.partial):
        parts = (found.func, found.args, found.keywords)
        yield from ((parts, i, v, path, False) for i, v in enumerate(parts))
    if isinstance(found, types.FunctionType):
        for name, cell in zip(found.__code__.co_freevars, found.__closure__ or (), strict=True):
            holder = _Cell(cell)
            yield from ((holder, i, v, name, False) for i, v in enumerate(holder))
        held = (found.__defaults__ or (), found.__kwdefaults__ or {})
        yield from ((held, i, v, path, False) for i, v in enumerate(held))
    attributes = getattr(found, "__dict__", None)
    if not isinstance(attributes, dict):
        return
    for key, value in list(attributes.items()):
        if is_module and key in ("_parameters", "_buffers", "_modules"):
            for name, part in list(value.items()):
                yield value, name, part, _join(path, name), key != "_modules"
        else:
            yield attributes, key, value, _join(path, key), False


def _states(found: Any, path: str) -> Iterator[tuple[Any, str]]:
    """What of an object can be changed, and copied, with its name."""
    if isinstance(found, (dict, list, set, deque)):
        yield found, path
        return
    if isinstance(found, types.FunctionType):
        yield from ((_Cell(c), name) for name, c in zip(found.__code__.co_freevars, found.__closure__ or (), strict=True))
    attributes = getattr(found, "__dict__", None)
    if isinstance(attributes, dict):
        yield attributes, path
        if isinstance(found, nn.Module):
            yield from ((attributes[k], path) for k in ("_parameters", "_buffers", "_modules") if k in attributes)


def _changed(held: Any, before: Any, path: str, equal: Callable[[object, object], bool]) -> Iterator[str]:
    """The names of what is not as it was."""
    if isinstance(held, MutableMapping):
        yield from (_join(path, k) for k, v in before.items() if k not in held or not equal(held[k], v))
        yield from (_join(path, k) for k in held if k not in before)
    elif len(held) != len(before) or not (held == before if isinstance(held, MutableSet) else all(map(equal, held, before))):
        yield path or type(held).__name__


def _equal(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and a == b)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


class _Cell(MutableSequence[Any]):
    """A closure's variable as a list: of what it holds, or of nothing where it was not assigned yet."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def copy(self) -> list[Any]:
        """What it holds now."""
        try:
            return [self._cell.cell_contents]
        except ValueError:
            return []

    def __getitem__(self, index: Any) -> Any:
        return self.copy()[index]

    def __len__(self) -> int:
        return len(self.copy())

    def __setitem__(self, index: Any, value: Any) -> None:
        self._cell.cell_contents = value

    def __delitem__(self, index: Any) -> None:
        del self._cell.cell_contents

    def insert(self, index: int, value: Any) -> None:
        """Assign the variable."""
        self._cell.cell_contents = value


class _Members:
    """A set, looked up as if it were a dict: a member is where it is."""

    def __init__(self, members: Any) -> None:
        self._members = members

    def __getitem__(self, member: object) -> object:
        return member if member in self._members else None
