"""What was made of each weight, for as long as the weight lives: quantized once, packed once, released once.

A compiled model is several graphs (prefill, decode, other shapes, the parts between graph breaks). All of them find what
the first one made of a parameter by the parameter's identity.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qcompile.kernels.dispatch import Packed
from qcompile.kernels.qtensor import QTensor


class WeightCache(MutableMapping[tuple[object, ...], Any]):
    """The memo of :class:`~qcompile.passes.program.Program`, shared by the graphs of one process.

    Entries go when one of the parameters that they were made from is collected.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[object, ...], Any] = {}
        self._records: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.RLock()
        self._next = 0

    def __getitem__(self, key: tuple[object, ...]) -> Any:
        return self._entries[key]

    def __setitem__(self, key: tuple[object, ...], value: Any) -> None:
        self._entries[key] = value

    def __delitem__(self, key: tuple[object, ...]) -> None:
        del self._entries[key]

    def __iter__(self) -> Iterator[tuple[object, ...]]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def identity(self, parameter: Tensor) -> tuple[object, ...]:
        """Equal for as long as it is the same parameter with the same values."""
        with self._lock:
            record = self._records.get(parameter)
            if record is None or (record["version"] != parameter._version and record["skeleton"] is None):
                self._next += 1
                record = {"token": Token(self._next), "version": parameter._version, "skeleton": None}
                self._records[parameter] = record
                weakref.finalize(record["token"], self._forget, self._next)
            return (record["token"].number,)

    def skeleton(self, parameter: Tensor) -> Tensor:
        """The parameter, or a meta tensor of its shape and strides if its values were released."""
        record = self._records.get(parameter)
        if record is None or record["skeleton"] is None:
            return parameter
        if not is_released(parameter):
            # Somebody gave the parameter new values after the release: it is a new weight.
            del self._records[parameter]
            return parameter
        return record["skeleton"]

    def release(self, parameter: torch.nn.Parameter) -> bool:
        """Free the values of a parameter, leaving its shape; a later read gives NaN, a later write raises.

        Returns False, and frees nothing, where another tensor shares the storage.
        """
        with self._lock:
            self.identity(parameter)
            record = self._records[parameter]
            storage = parameter.untyped_storage()
            if record["skeleton"] is not None or torch._C._storage_Use_Count(storage._cdata) > 2:
                return False
            record["skeleton"] = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"
            )
            parameter.data = torch.full((1,), torch.nan, dtype=parameter.dtype, device=parameter.device).expand(
                parameter.shape
            )
            return True

    def trim(self, alive: set[int]) -> None:
        """Keep of each entry that no program holds (by ``id`` of its tensors) only shapes and dtypes."""
        with self._lock:
            for key, value in self._entries.items():
                self._entries[key] = _trimmed(value, alive)

    def discard(self, numbers: set[int]) -> None:
        """Forget all that was made of the parameters with these identities."""
        for number in numbers:
            self._forget(number)

    def _forget(self, number: int) -> None:
        with self._lock:
            for key in [k for k in self._entries if _mentions(k, number)]:
                del self._entries[key]


class Token:
    """Lives as long as the record of its parameter."""

    def __init__(self, number: int) -> None:
        self.number = number


def is_released(parameter: Tensor) -> bool:
    """Whether a parameter's values were freed by :meth:`WeightCache.release`."""
    return (
        parameter.numel() > 1
        and not any(parameter.stride())
        and parameter.untyped_storage().nbytes() == parameter.element_size()
    )


def numbers_in(key: object) -> set[int]:
    """The identities that a key mentions."""
    if isinstance(key, tuple):
        if len(key) >= 1 and type(key[0]) is int:
            return {key[0]}
        return set().union(*(numbers_in(k) for k in key)) if key else set()
    return set()


def _mentions(key: object, number: int) -> bool:
    return number in numbers_in(key)


def _trimmed(value: Any, alive: set[int]) -> Any:
    if isinstance(value, tuple) and value and isinstance(value[0], QTensor):
        quantized, *rest = value
        parts = [quantized.data, quantized.scale, quantized.zero]
        if any(p is not None and id(p) in alive for p in parts) or quantized.data.is_meta:
            return value
        data, scale, zero = (None if p is None else p.to("meta") for p in parts)
        return (QTensor(data, scale, zero, quantized.scheme, quantized.shape), *rest)  # type: ignore[arg-type]
    if isinstance(value, Packed):
        if any(t is not None and id(t) in alive for t in value.tensors):
            return value
        return Packed(tuple(None if t is None else t.to("meta") for t in value.tensors), value.sizes)
    if isinstance(value, Tensor) and id(value) not in alive:
        return value.to("meta")
    return value
