"""The tensors of a CTranslate2 ``model.bin``, version 6 of its layout: names, shapes and values, nothing executed.

Everything is little-endian. A string is its length with the closing zero byte, as uint16, and its bytes::

    uint32 version   string name of the specification   uint32 revision of the specification
    uint32 count, then for each variable:
        string name   uint8 rank   uint32 sizes[rank]   uint8 dtype   uint32 bytes   the values
    uint32 count, then for each alias: string alias   string name of a variable
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

import numpy as np

__all__ = ["read"]

_DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_VERSION = 6


def read(path: Path, specification: str) -> dict[str, np.ndarray]:
    """Every variable of the file by name, aliases among them.

    Args:
        path: the ``model.bin``.
        specification: the name that the file must give its kind of model, such as ``"WhisperSpec"``.

    Raises:
        ValueError: the file is of another version or specification, is cut short, goes on after its end, names a
            variable twice, has a type that numpy lacks, or a variable whose bytes do not fit its shape.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, size, path.name)
        version = reader.number("I")
        if version != _VERSION:
            raise ValueError(f"{path.name} is of version {version} of CTranslate2's layout; {_VERSION} can be read")
        found = reader.text()
        if found != specification:
            raise ValueError(f"{path.name} holds a {found!r}, not a {specification!r}")
        reader.number("I")
        variables: dict[str, np.ndarray] = {}
        for _ in range(reader.number("I")):
            name = reader.text()
            if name in variables:
                raise ValueError(f"{path.name} holds {name!r} twice")
            variables[name] = reader.tensor(name)
        for _ in range(reader.number("I")):
            alias, name = reader.text(), reader.text()
            if name not in variables or alias in variables:
                raise ValueError(f"{path.name} has an alias {alias!r} of {name!r}, which is not there or stands already")
            variables[alias] = variables[name]
        if file.tell() != size:
            raise ValueError(f"{path.name} goes on for {size - file.tell()} bytes after its end")
    return variables


class _Reader:
    """Reads the parts of the file; never asks for more bytes than the file has left."""

    def __init__(self, file: IO[bytes], size: int, name: str) -> None:
        self._file, self._size, self._name = file, size, name

    def take(self, count: int) -> bytes:
        at = self._file.tell()
        if count > self._size - at:
            raise ValueError(f"{self._name} is cut short: {count} bytes wanted at {at}, {self._size - at} left")
        return self._file.read(count)

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def text(self) -> str:
        content = self.take(self.number("H"))
        if not content.endswith(b"\0"):
            raise ValueError(f"{self._name} has a string without its closing zero before byte {self._file.tell()}")
        return content[:-1].decode("utf-8")

    def tensor(self, name: str) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind = self.number("B")
        if kind not in _DTYPES:
            raise ValueError(f"{self._name}: {name!r} has dtype {kind}; {sorted(_DTYPES)} can be read")
        dtype = np.dtype(_DTYPES[kind])
        count = self.number("I")
        wanted = dtype.itemsize
        for length in shape:  # Python's integers: no overflow, whatever the file says
            wanted *= length
        if count != wanted:
            raise ValueError(f"{self._name}: {name!r} has {count} bytes, shape {shape} of {dtype} takes {wanted}")
        return np.frombuffer(self.take(count), dtype).reshape(shape)
