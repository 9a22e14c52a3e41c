"""What stands for a fake value in the key of a table: calls that agree in it give results that agree in it.

A program repeats itself, layer by layer. Torch computes each fake value anew, through several layers of Python, at half a
millisecond a call; a table of those that are known already costs a hundredth of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["FakeValues", "UnlikeError", "described", "fake_of", "is_pure", "key_of", "skeleton_of"]

_PLAIN = (int, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class FakeValues:
    """The fake results of operators in one mode, each kind computed once.

    Calls of one kind share one result: whoever reads it looks at shape, strides and dtype, and writes nothing.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Hashable, Any] = {}

    def __call__(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``target(*args, **kwargs)`` gives in the mode."""
        key: Hashable = None
        if is_pure(target):
            tensors: dict[int, torch.Tensor] = {}
            try:
                key = (target, key_of(args, self._mode, tensors), key_of(kwargs, self._mode, tensors))
            except UnlikeError:
                key = None
            if key in self._known:
                return self._known[key]
        with self._mode, torch.no_grad():
            result = target(*args, **kwargs)
        if key is not None:
            try:
                key_of(result, self._mode, {})
            except UnlikeError:
                return result
            self._known[key] = result
        return result


def skeleton_of(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def fake_of(tensor: torch.Tensor, mode: FakeTensorMode) -> FakeTensor:
    """The fake of a tensor with values.

    That of a plain tensor, as passes make them by the hundred, is made without all the questions that torch asks of any.
    """
    is_plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.requires_grad
    if not is_plain or tensor.storage_offset() or tensor.is_conj() or tensor.is_neg() or tensor.is_inference():
        return mode.from_tensor(tensor, static_shapes=True)
    return FakeTensor(mode, skeleton_of(tensor), tensor.device)


def is_pure(target: object) -> bool:
    """Whether this is an operator that only reads its arguments."""
    return isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable


class UnlikeError(Exception):
    """A value of which nothing short says what calls make of it: a size that is a symbol, an object, a tensor of its own."""


def described(tensor: torch.Tensor, mode: FakeTensorMode) -> Hashable:
    """All that the fake results of a call can depend on in one argument.

    Raises:
        UnlikeError: it is no plain fake tensor of ``mode``, or its sizes are symbols.
    """
    if type(tensor) is not FakeTensor or tensor.fake_mode is not mode or tensor.constant is not None:
        raise UnlikeError
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        raise UnlikeError
    shape, strides, offset = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    if any(type(n) is not int for n in (*shape, *strides, offset)):
        raise UnlikeError
    # a parameter's fake is one too, and what depends on gradients may depend on that
    leaf = (tensor.requires_grad, tensor.is_leaf, tensor.is_inference())
    return (shape, strides, offset, tensor.dtype, tensor.fake_device, leaf)


def key_of(value: Any, mode: FakeTensorMode, tensors: dict[int, torch.Tensor]) -> Hashable:
    """An argument as a key.

    Args:
        tensors: collects the tensors in it by their ``id``, in the order of their first place; the key says which tensors
            are the same one.

    Raises:
        UnlikeError: the argument, or something in it, is none of plain number, text, dtype, device, tensor, list, tuple.
    """
    if isinstance(value, torch.Tensor):
        known = described(value, mode)
        tensors.setdefault(id(value), value)
        return ("tensor", list(tensors).index(id(value)), known)
    if isinstance(value, (list, tuple)):
        return (type(value), *(key_of(v, mode, tensors) for v in value))
    if isinstance(value, dict):
        return (dict, *((k, key_of(v, mode, tensors)) for k, v in value.items()))
    if type(value) is slice:
        return (slice, *(key_of(v, mode, tensors) for v in (value.start, value.stop, value.step)))
    if type(value) is float:
        return (float, value.hex())  # -0.0 is not 0.0
    if value is Ellipsis or type(value) in _PLAIN:
        return (type(value), value)
    raise UnlikeError
