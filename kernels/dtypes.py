"""The quantized dtypes: how many bits, what kind of number, which range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class QType:
    """A quantized dtype.

    Integer types hold ``2**bits`` codes. Symmetric codes run from :attr:`qmin` to :attr:`qmax` (two's complement);
    affine codes are unsigned, from 0 to :attr:`levels` - 1. Floating types hold a torch float8 dtype.

    Attributes:
        name: what users write, ``"qint4"``.
        bits: bits a code takes in storage.
        kind: ``"int"`` or ``"float"``.
        dtype: the torch dtype that holds one code unpacked: ``torch.int8`` for integers, else a float8 dtype.

    Example:
        >>> qint4.qmin, qint4.qmax, qint4.levels
        (-8, 7, 16)
    """

    name: str
    bits: int
    kind: Literal["int", "float"]
    dtype: torch.dtype

    @property
    def is_float(self) -> bool:
        """Whether a code is itself a floating point number."""
        return self.kind == "float"

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def qmin(self) -> float:
        """The lowest symmetric code (a float8's lowest finite value)."""
        return torch.finfo(self.dtype).min if self.is_float else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> float:
        """The highest symmetric code (a float8's highest finite value)."""
        return torch.finfo(self.dtype).max if self.is_float else (1 << (self.bits - 1)) - 1

    @property
    def offset(self) -> int:
        """What is added to a symmetric integer code to store it unsigned (offset binary)."""
        return 0 if self.is_float else 1 << (self.bits - 1)

    def __repr__(self) -> str:
        return f"qcompile.{self.name}"

    def __str__(self) -> str:
        return self.name


qint2 = QType("qint2", 2, "int", torch.int8)
qint3 = QType("qint3", 3, "int", torch.int8)
qint4 = QType("qint4", 4, "int", torch.int8)
qint5 = QType("qint5", 5, "int", torch.int8)
qint6 = QType("qint6", 6, "int", torch.int8)
qint8 = QType("qint8", 8, "int", torch.int8)
qfloat8_e4m3fn = QType("qfloat8_e4m3fn", 8, "float", torch.float8_e4m3fn)
qfloat8_e4m3fnuz = QType("qfloat8_e4m3fnuz", 8, "float", torch.float8_e4m3fnuz)
qfloat8_e5m2 = QType("qfloat8_e5m2", 8, "float", torch.float8_e5m2)
qfloat8 = qfloat8_e4m3fn

#: Every quantized dtype by name.
qtypes: dict[str, QType] = {
    t.name: t
    for t in (qint2, qint3, qint4, qint5, qint6, qint8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2)
}

_ALIASES = {"qfloat8": "qfloat8_e4m3fn"}


def qtype(name: str | QType) -> QType:
    """Look a quantized dtype up by name, with or without the leading ``q``.

    Raises:
        ValueError: no such dtype; the message lists the known ones.
        TypeError: neither a name nor a :class:`QType`.

    Example:
        >>> qtype("int4") is qint4 and qtype(qint4) is qint4
        True
    """
    if isinstance(name, QType):
        return name
    if not isinstance(name, str):
        raise TypeError(
            f"a quantized dtype must be a qcompile dtype or its name, got {name!r} of type {type(name).__name__}; "
            f"allowed: {', '.join(qtypes)}"
        )
    wanted = name if name.startswith("q") else f"q{name}"
    wanted = _ALIASES.get(wanted, wanted)
    if wanted not in qtypes:
        known = ", ".join(qtypes)
        raise ValueError(f"unknown quantized dtype {name!r}; allowed: {known} (the leading 'q' may be left out)")
    return qtypes[wanted]
