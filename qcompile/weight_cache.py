"""What was made of each weight, for as long as the weight lives: quantized once, packed once, released once.

A compiled model is several graphs (prefill, decode, other shapes, the parts between graph breaks). All of them find what
the first one made of a parameter by the parameter's identity.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from qcompile.kernels.dispatch import Packed
from qcompile.kernels.qtensor import QTensor


@dataclass(frozen=True)
class WeightId:
    """Stands in keys for one parameter with one set of values."""

    number: int


class WeightCache(MutableMapping[tuple[object, ...], Any]):
    """The memo of :class:`~qcompile.passes.program.Program`, shared by the graphs of one process.

    An entry does not keep its tensors alive: what a pass replaces (codes that were packed, parts that were stacked) is
    freed at once, and from then on is read as meta tensors, which have its shapes and dtypes only. :meth:`hold` keeps
    those that a finished program reads. Entries go when one of the parameters that they were made from is collected.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[object, ...], _Entry] = {}
        self._records: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.RLock()
        self._next = 0

    def __getitem__(self, key: tuple[object, ...]) -> Any:
        return self._entries[key].value()

    def __setitem__(self, key: tuple[object, ...], value: Any) -> None:
        with self._lock:
            self._entries[key] = _Entry(value)

    def __delitem__(self, key: tuple[object, ...]) -> None:
        with self._lock:
            del self._entries[key]

    def __iter__(self) -> Iterator[tuple[object, ...]]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache keeps alive."""
        with self._lock:
            held = {id(t): t for e in self._entries.values() for t in e.held}
        return sum(t.numel() * t.element_size() for t in held.values())

    def identity(self, parameter: Tensor) -> tuple[object, ...]:
        """Equal for as long as it is the same parameter with the same values."""
        with self._lock:
            record = self._records.get(parameter)
            if record is None or record.changed(parameter):
                self._next += 1
                pinned = record is not None and record.pinned
                record = self._records[parameter] = _Record(WeightId(self._next), *state_of(parameter), pinned=pinned)
                # The record goes with its parameter; the entries go with the record.
                weakref.finalize(record, self._forget, {record.id}).atexit = False
            return (record.id,)

    def skeleton(self, parameter: Tensor) -> Tensor:
        """The parameter, or a meta tensor of its shape and strides if its values were released."""
        with self._lock:
            record = self._records.get(parameter)
            if record is None or record.skeleton is None:
                return parameter
            if not is_released(parameter):
                # Somebody gave the parameter new values after the release: it is a new weight.
                del self._records[parameter]
                return parameter
            return record.skeleton

    def pin(self, parameter: Tensor) -> None:
        """Never release a parameter: a compiled graph reads its float values."""
        with self._lock:
            self.identity(parameter)
            self._records[parameter].pinned = True

    def quantized(self) -> set[WeightId]:
        """The identities of all parameters of whose values codes were made."""
        with self._lock:
            return ids_in(tuple(key for key in self._entries if key[0] == "weight"))

    def release(self, parameter: torch.nn.Parameter) -> bool:
        """Free the values of a parameter, leaving its shape; a later read gives NaN, a later write raises.

        Returns:
            Whether the values are gone. They stay where a compiled graph reads them (:meth:`pin`) or another tensor
            shares their storage.
        """
        with self._lock:
            self.identity(parameter)
            record = self._records[parameter]
            if record.skeleton is not None:
                return True
            storage = parameter.untyped_storage()
            # Two uses are the parameter and the Python object of its storage that was just made.
            if record.pinned or parameter.numel() < 2 or torch._C._storage_Use_Count(storage._cdata) > 2:
                return False
            shape, strides = parameter.shape, parameter.stride()
            record.skeleton = torch.empty_strided(shape, strides, dtype=parameter.dtype, device="meta")
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                nan = torch.full((1,), torch.nan, dtype=parameter.dtype, device=parameter.device)
                parameter.data = nan.as_strided(shape, (0,) * len(shape))
            return True

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Keep the entries that these tensors, which a finished program reads, belong to."""
        wanted = {id(t) for t in tensors}
        with self._lock:
            for entry in self._entries.values():
                entry.hold(wanted)

    def discard(self, ids: set[WeightId]) -> None:
        """Forget all that was made of the parameters with these identities."""
        self._forget(ids)

    def _forget(self, ids: set[WeightId]) -> None:
        with self._lock:
            for key in list(self._entries):
                if not ids.isdisjoint(ids_in(key)):
                    del self._entries[key]


@dataclass(eq=False)
class _Record:
    """What is known of one parameter.

    Attributes:
        id: its place in keys.
        version, address: of the values that it had.
        pinned: it must keep them.
        skeleton: stands for the values that were released.
    """

    id: WeightId
    version: int
    address: int
    pinned: bool = False
    skeleton: Tensor | None = None

    def changed(self, parameter: Tensor) -> bool:
        """Whether the parameter has other values than those that the record is about."""
        if self.skeleton is not None:
            return not is_released(parameter)
        return (self.version, self.address) != state_of(parameter)


class _Entry:
    """One value, by weak references to its tensors until it is held."""

    def __init__(self, value: Any) -> None:
        parts = _tensors(value)
        self._references = [TensorWeakRef(t) for t in parts]
        self._shapes = _rebuilt(value, [t.to("meta") for t in parts])
        self.held: tuple[Tensor, ...] = ()

    def value(self) -> Any:
        """The value; with meta tensors if it was freed."""
        parts = [r() for r in self._references]
        return self._shapes if any(p is None for p in parts) else _rebuilt(self._shapes, parts)

    def hold(self, wanted: set[int]) -> None:
        """Keep the tensors alive if any of them is wanted (by ``id``)."""
        parts = [r() for r in self._references]
        if any(id(p) in wanted for p in parts if p is not None) and not any(p is None for p in parts):
            self.held = tuple(p for p in parts if p is not None)


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor is written to in place, or given other data: its version and its address."""
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()


def is_released(parameter: Tensor) -> bool:
    """Whether a parameter's values were freed by :meth:`WeightCache.release`."""
    return (
        parameter.numel() > 1
        and not any(parameter.stride())
        and parameter.untyped_storage().nbytes() == parameter.element_size()
    )


def ids_in(key: object) -> set[WeightId]:
    """The identities that a key mentions."""
    if isinstance(key, WeightId):
        return {key}
    return set().union(*map(ids_in, key)) if isinstance(key, tuple) and key else set()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of what passes remember: a tensor, a packed weight, or a quantized value and its error."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Packed):
        return [t for t in value.tensors if t is not None]
    if isinstance(value, tuple) and value and isinstance(value[0], QTensor):
        return [t for t in (value[0].data, value[0].scale, value[0].zero) if t is not None]
    raise TypeError(f"the weight cache holds tensors, packed weights and quantized values, not {type(value).__name__}")


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    """``value`` with other tensors, in the order of :func:`_tensors`."""
    if isinstance(value, Tensor):
        return parts[0]
    rest = iter(parts)
    if isinstance(value, Packed):
        return Packed(tuple(None if t is None else next(rest) for t in value.tensors), value.sizes)
    old, *others = value
    data, scale = next(rest), next(rest)
    zero = None if old.zero is None else next(rest)
    return (QTensor(data, scale, zero, old.scheme, old.shape), *others)
